"""`launch serve-rm`: a reward model or function behind HTTP until Ctrl-C or SIGTERM."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping

import torch
import transformers

from hone.launch.builtin import cache_directory
from hone.launch.errors import ENVIRONMENT, Problem, UsageError
from hone.launch.processes import Descendants, adopt_orphans, keep_bytecode
from hone.launch.reward_server import PATH, RewardServer, listen
from hone.launch.scoring import RewardModel
from hone.launch.using_config import ServeRMConfig
from hone.rollout.rewards import judges
from hone.rollout.rewards.http import TOKEN
from hone.rollout.rewards.judges import Closable


def run(config: ServeRMConfig, sources: Mapping[str, str]) -> int:
    """Serve until told to end; returns the exit code. Raises ModelError, RewardError, and UsageError for a port that is taken."""
    keep_bytecode(cache_directory() / "bytecode")
    adopt_orphans()
    transformers.utils.logging.disable_progress_bar()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with Descendants():
        judge = _judge(config)
        try:
            return asyncio.run(_serve(config, judge))
        finally:
            judge.close()


def _judge(config: ServeRMConfig) -> Closable:
    model = config.model
    if model.model_name_or_path is None:
        return judges.build(config.reward, default="")
    print(f"loading {model.model_name_or_path}", file=sys.stderr, flush=True)
    return RewardModel(
        model.model_name_or_path,
        dtype=model.param_dtype,
        max_len=model.max_len,
        normalize=model.normalize,
        batch_size=config.server.batch_size,
    )


async def _serve(config: ServeRMConfig, judge: Closable) -> int:
    own = config.server
    token = os.environ.get(TOKEN, "").strip()
    server = RewardServer(judge, token=token, max_rows=own.max_rows, max_bytes=own.max_bytes, max_waiting=own.max_waiting)
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    try:
        runner, port = await listen(server, host=own.host, port=own.port)
    except OSError as error:
        what = f"{own.host}:{own.port} cannot be listened at: {error.strerror}"
        mend = "choose another --server.port (0 for any that is free), or another --server.host"
        raise UsageError([Problem(what=what, mend=mend, where="--server.port", code=ENVIRONMENT)]) from error
    host = f"[{own.host}]" if ":" in own.host else own.host
    print(f"rewards at http://{host}:{port}{PATH}{' (with a bearer token)' if token else ''}; Ctrl-C ends it", flush=True)
    try:
        await ended.wait()
    finally:
        await runner.cleanup()
    print(f"answered {server.requests} requests, {server.rows} rows", flush=True)
    return 0
