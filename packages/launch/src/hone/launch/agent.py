"""Who acts, where it is not the policy alone: an environment or an agent of the user's, loaded before anything heavy starts."""

from collections.abc import Callable

from hone.launch.config import PolicyGradientConfig
from hone.launch.observe.progress import READY
from hone.launch.plan import stop_ids
from hone.launch.prompts import PromptData
from hone.rollout.agents.calling import CommandAgent
from hone.rollout.agents.loading import Agent, load
from hone.rollout.endpoint.rollout import Caller
from hone.rollout.endpoint.templates import served_template
from hone.rollout.errors import EnvironmentFailure


def agent_of(
    config: PolicyGradientConfig, model: str, prompts: PromptData, *, on_start: Callable[[str, str], None], note: Callable[[str], None]
) -> Agent | Caller | None:
    """The run's environment or agent, if it has one. Raises EnvironmentFailure, for a chat template that cannot serve it too."""
    file, command = config.rollout.agent_func_path, config.rollout.agent_command
    if file is None and command is None:
        return None
    on_start("agent", "loading" if command is None else "looking at the chat template")
    agent = load(file) if file is not None else CommandAgent(command=command or "")
    if not isinstance(agent, Agent):
        if prompts.with_images is not None:
            raise EnvironmentFailure(
                f"agent {agent.where} would not see the images of the rows: an agent sends its own; hand it the column as it stands "
                "(--data.image-key none), or use an environment"
            )
        served = served_template(prompts.tokenizer, stop_ids=stop_ids(model, prompts.tokenizer))
        for reason in () if served is None else served.reservations:
            note(reason)
        agent = Caller(agent=agent, served=served)
    on_start("agent", READY)
    return agent
