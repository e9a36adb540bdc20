"""NeMo Gym: its simple agent, its weather example and its model server, with our endpoint behind that server (`just foreign`).

    uv run launch grpo --rollout.agent-command ".foreign/nemo_gym/bin/python examples/foreign/nemo_gym_agent.py" \
        --actor.model-name-or-path DIR --data.prompt-dataset examples/sums.jsonl --data.input-key question --data.label-key answer

The three servers are NeMo Gym's own, run in one process for one episode: the agent asks the model server for responses, calls the
resources server's tool, and has it verify. The row goes to the agent's /run; the reward is in its answer.
"""

import asyncio
import json
import os
import socket
import sys
from contextlib import AsyncExitStack, asynccontextmanager, redirect_stdout

import uvicorn
from nemo_gym.config_types import BaseServerConfig, ModelServerRef, ResourcesServerRef
from nemo_gym.server_utils import GlobalAIOHTTPAsyncClientConfig, ServerClient, set_global_aiohttp_client
from omegaconf import OmegaConf
from resources_servers.example_single_tool_call.app import SimpleWeatherResourcesServer, SimpleWeatherResourcesServerConfig
from responses_api_agents.simple_agent.app import SimpleAgent, SimpleAgentConfig
from responses_api_models.vllm_model.app import VLLMModel, VLLMModelConfig

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False},
    "strict": True,
}
KINDS = {"weather": "resources_servers", "policy_model": "responses_api_models", "simple_agent": "responses_api_agents"}


@asynccontextmanager
async def serving(app, at: socket.socket):
    """The application on a socket of this machine's loopback, for as long as the block lasts."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    running = asyncio.create_task(server.serve(sockets=[at]))
    try:
        yield
    finally:
        server.should_exit = True
        await running


async def played(row: dict) -> dict:
    sockets = {name: socket.create_server(("127.0.0.1", 0)) for name in KINDS}
    places = {name: {"host": "127.0.0.1", "port": one.getsockname()[1]} for name, one in sockets.items()}
    directory = OmegaConf.create({name: {kind: {name: places[name]}} for name, kind in KINDS.items()})
    client = ServerClient(head_server_config=BaseServerConfig(host="127.0.0.1", port=1), global_config_dict=directory)

    def settings(name: str) -> dict:
        return {"name": name, "entrypoint": "app.py", **places[name]}

    weather = SimpleWeatherResourcesServer(config=SimpleWeatherResourcesServerConfig(**settings("weather")), server_client=client)
    model = VLLMModel(
        config=VLLMModelConfig(
            **settings("policy_model"),
            base_url=os.environ["OPENAI_BASE_URL"],
            api_key=os.environ["OPENAI_API_KEY"],
            model="policy",
            return_token_id_information=True,
            uses_reasoning_parser=True,
        ),
        server_client=client,
    )
    agent = SimpleAgent(
        config=SimpleAgentConfig(
            **settings("simple_agent"),
            resources_server=ResourcesServerRef(type="resources_servers", name="weather"),
            model_server=ModelServerRef(type="responses_api_models", name="policy_model"),
            max_steps=4,
        ),
        server_client=client,
    )
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(set_global_aiohttp_client(GlobalAIOHTTPAsyncClientConfig()))
        for name, server in (("weather", weather), ("policy_model", model), ("simple_agent", agent)):
            app = server.setup_webserver()
            server.setup_exception_middleware(app)
            await stack.enter_async_context(serving(app, sockets[name]))
        asked = {"responses_create_params": {"input": row["prompt"], "tools": [WEATHER]}}
        response = await client.post(server_name="simple_agent", url_path="/run", json=asked)
        answer = json.loads(await response.read())
    if response.status != 200:
        sys.exit(f"/run answered {response.status}: {answer}")
    return answer


def main() -> None:
    row = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):  # it prints what it does
        answer = asyncio.run(played(row))
    calls = sum(item["type"] == "function_call" for item in answer["response"]["output"])
    print(json.dumps({"reward": answer["reward"], "tool_calls": calls}))


main()
