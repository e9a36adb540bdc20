"""Ray actors behind the protocols of the loop: learner ranks as a RoleGroup, engine actors as Engine and ServedEngine.

Flow of data: the controller packs a rollout into flat tensors, cuts it into one shard per rank, puts each shard into Ray's
object store once, and the ranks read it there; per-token results travel back the same way. Flow of weights: rank 0 of the
policy's group drives the engines through vLLM's own four calls (`EngineClient`), so no weight passes the controller.
"""

import asyncio
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import psutil
import ray
import ray.exceptions
import torch
from ray.actor import ActorHandle
from torch import Tensor

from hone.algos.batch import Attachment, Batch, Packed, Scored
from hone.algos.offline import Offline
from hone.algos.protocol import ActorCritic, Algorithm
from hone.launch.sent import Sent, sent
from hone.launch.transport import Transport
from hone.learner.checkpoint.snapshot import Outcome
from hone.learner.learner import Learner
from hone.learner.packing import Shard, shards, unshard, unshard_rows
from hone.learner.roles import StepResult
from hone.rollout.errors import EngineError, EngineLost
from hone.rollout.types import Completion, PauseMode, Request
from hone.rollout.weight_sync import trainer
from hone.rollout.weight_sync.protocol import FanOut, Trainer

STARTING_S = 1800.0
"""How long an engine gets to import vLLM and load its model [s]: a large one from a slow disk takes many minutes."""
CLOSING_S = 20.0
"""How long an engine gets to end its processes by itself [s]."""


class RankLost(Exception):
    """A learner process died; names it and the cause Ray saw."""


def unwrapped(error: BaseException) -> BaseException:
    """What a task raised, out of Ray's wrappers: one for each process it has crossed."""
    while isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def get(references: Sequence[Any], *, who: str, timeout_s: float | None = None, doing: str = "") -> list[Any]:
    """`ray.get` whose failures are the task's own exception, or RankLost naming who died, or who is still `doing` it at the deadline."""
    try:
        return ray.get(list(references), timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        raise unwrapped(error) from error
    except ray.exceptions.GetTimeoutError as error:
        _, still = ray.wait(list(references), num_returns=len(references), timeout=0)
        waiting = ", ".join(str(index) for index, one in enumerate(references) if one in still)
        raise RankLost(
            f"{who} is not done {doing} after {timeout_s:g} s: the controller waits for rank {waiting}; see the run directory's logs/, "
            "or raise --vllm.sync-timeout-s where the model is that large"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise RankLost(f"{who} died: {error}\n  its output is in the run directory's logs/; out of memory is the usual cause") from error


def _added(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures of all ranks. They are weighted sums, which add up over ranks just as they do over micro-batches.

    A rank that had only fillers reports none, nor does any but the first of a ring.
    """
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: sum(share.get(name, 0.0) for share in shares) for name in names}


class _Weights:
    """A role's weights, or its adapter alone, as a stream that starts afresh on every pass, as the sending end wants it."""

    def __init__(self, learner: Learner, role: str, *, adapter: bool) -> None:
        self._learner, self._role, self._adapter = learner, role, adapter

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._learner.adapter(self._role) if self._adapter else self._learner.weights(self._role)


class LearnerRank:
    """One learner process: a rank of a group, hosting all of the group's roles, and on rank 0 the sending end of the sync."""

    def __init__(self, *, rank: int, world_size: int, threads: int) -> None:
        self._rank, self._world_size, self._threads = rank, world_size, threads
        self._trainer: Trainer | None = None

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port of this process's machine, where the group's ranks will meet."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def build(self, **settings: Any) -> None:
        """Load the models; collective over the group."""
        torch.set_num_threads(self._threads)
        self._learner = Learner(rank=self._rank, world_size=self._world_size, **settings)

    def connect(self, way: Transport, engines: Mapping[str, ActorHandle], role: str) -> None:
        """Open the sending end of the weight sync towards these engines and no others, by name."""
        if self._trainer is not None:
            self._trainer.close()
        clients = [EngineClient(name, engine, timeout_s=way.timeout_s) for name, engine in engines.items()]
        self._trainer = trainer(
            way.backend,
            client=FanOut(clients, ranks_per_engine=way.ranks_per_engine),
            source=_Weights(self._learner, role, adapter=way.lora_rank > 0),
            rank=self._rank,
            workers=way.ranks_per_engine * len(engines),
            directory=way.directory,
            dtype=way.dtype,
            delta=way.delta,
            adapter=self._learner.adapter_config(role) if way.lora_rank else None,
        )

    def send(self) -> dict[str, str]:
        """Send the weights; collective over the group. Returns the fingerprint of every tensor."""
        assert self._trainer is not None, "send before connect"
        return self._trainer.send_weights()

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """A method of the learner."""
        given = [arg.shard() if isinstance(arg, Sent) else arg for arg in args]
        return getattr(self._learner, method)(*given, **options)


class EngineClient:
    """vLLM's four weight-transfer calls on one engine actor; synchronous, as its trainers want them. Each raises EngineLost."""

    def __init__(self, name: str, engine: ActorHandle, *, timeout_s: float) -> None:
        self._name, self._engine, self._timeout_s = name, engine, timeout_s

    def _call(self, method: str, *args: Any) -> None:
        try:
            ray.get(getattr(self._engine, method).remote(*args), timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            what = f"did not answer within {self._timeout_s:g} s (--vllm.sync-timeout-s): the learner's rank 0 waits for its {method}"
            raise EngineLost(self._name, what) from error
        except ray.exceptions.RayTaskError as error:
            raise unwrapped(error) from error
        except ray.exceptions.RayActorError as error:
            raise EngineLost(self._name, f"died during {method}: {error}") from error

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the engine's end of the transport."""
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        """Begin an update."""
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Receive and load what `update_info` describes."""
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the update."""
        self._call("finish_weight_update", weight_version)


class RemoteEngine:
    """An engine actor behind the protocols Engine and ServedEngine."""

    def __init__(self, name: str, handle: ActorHandle) -> None:
        self.name, self.handle = name, handle
        self._core: list[int] = []

    def wait(self) -> None:
        """Return when the engine serves; raises EngineError when it could not start."""
        try:
            ray.get(self.handle.check_health.remote(), timeout=STARTING_S)
            self._core = ray.get(self.handle.pids.remote(), timeout=STARTING_S)
        except ray.exceptions.RayTaskError as error:
            raise unwrapped(error) from error
        except ray.exceptions.GetTimeoutError as error:
            raise EngineError(
                f"engine {self.name} did not start within {STARTING_S:g} s; its output is in the run directory's logs/"
            ) from error
        except ray.exceptions.RayActorError as error:
            raise EngineError(f"engine {self.name} did not start: {error}\n  its output is in the run directory's logs/") from error

    def close(self) -> None:
        """End the engine and its processes; one that died already has nothing left to end."""
        try:
            ray.get(self.handle.shutdown.remote(), timeout=CLOSING_S)
        except ray.exceptions.RayError:
            ray.kill(self.handle)

    def kill(self) -> None:
        """End whatever is left of it at once. A core that is stopped does not notice the end of its parent, so it is ended here too."""
        ray.kill(self.handle)
        for process in psutil.Process().children(recursive=True):
            if process.pid in self._core:
                process.kill()

    async def check_health(self) -> None:
        """Returns when the engine's core answers; raises EngineLost where it is dead."""
        await self._call("check_health")

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Draw all samples of one prompt; whoever gives up waiting has them aborted in the engine, too."""
        return await self._call("generate", requests, abort=True)

    async def prompt_logp(self, tokens: Sequence[int], images: Sequence[Attachment] = ()) -> list[float]:
        """Log-probabilities [nats] of `tokens[1:]` under the weights served now."""
        return await self._call("prompt_logp", tokens, images)

    async def pause(self, mode: PauseMode) -> None:
        """Begin no new requests, and freeze those in flight or wait for them."""
        await self._call("pause", mode)

    async def resume(self) -> None:
        """Go on."""
        await self._call("resume")

    async def sleep(self, level: Literal[1, 2]) -> None:
        """Give the GPU's memory back."""
        await self._call("sleep", level)

    async def wake(self, tags: Sequence[Literal["weights", "kv_cache"]]) -> None:
        """Take it again."""
        await self._call("wake", tags)

    async def set_version(self, version: int) -> None:
        """Label the weights served from now on."""
        await self._call("set_version", version)

    async def version(self) -> int:
        """The label of the weights served now."""
        return await self._call("version")

    async def fingerprints(self) -> dict[str, str]:
        """What the last update received, by name."""
        return await self._call("fingerprints")

    async def suspects(self) -> list[str]:
        """Parameters whose bytes the engine cannot vouch for."""
        return await self._call("suspects")

    async def _call(self, method: str, *args: Any, abort: bool = False) -> Any:
        reference = getattr(self.handle, method).remote(*args)
        try:
            return await reference
        except asyncio.CancelledError:
            if abort:
                ray.cancel(reference)  # by itself Ray lets the task run on
            raise
        except ray.exceptions.RayTaskError as error:
            raise unwrapped(error) from error
        except ray.exceptions.RayActorError as error:
            raise EngineLost(self.name, f"died during {method}: {error}\n  its output is in the run directory's logs/") from error


class RemoteGroup:
    """A group of learner ranks behind the RoleGroup protocol; `cut` is what `shards` takes, `settings` what the Learner does.

    Call `wait` before anything else. Every `ring` times `tensor_parallel` consecutive ranks share a shard, and each of them returns the
    whole shard's results.
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[ActorHandle],
        *,
        cut: Mapping[str, Any],
        ring: int,
        tensor_parallel: int,
        settings: Mapping[str, Any],
    ) -> None:
        self.name, self.ranks, self._sharing = name, list(ranks), ring * tensor_parallel
        self._cut = {**cut, "max_tokens": cut["max_tokens"] * ring}
        self._written: dict[int, Outcome] = {}
        self._who = f"a process of group {name!r}"
        address, port = get([self.ranks[0].rendezvous.remote()], who=self._who)[0]
        self._building = [rank.build.remote(master_addr=address, master_port=port, **settings) for rank in self.ranks]

    def wait(self) -> None:
        """Return when every rank has loaded its models."""
        get(self._building, who=self._who)

    def connect(self, way: Transport, engines: Sequence[RemoteEngine]) -> None:
        """Open the policy's end of the weight sync towards the engines."""
        handles = {engine.name: engine.handle for engine in engines}
        asked = [rank.connect.remote(way, handles, "policy") for rank in self.ranks]
        get(asked, who=self._who, timeout_s=2 * way.timeout_s, doing="opening the weight transfer")

    def send(self, *, timeout_s: float) -> dict[str, str]:
        """Send the policy's weights; the fingerprints of what was sent. `timeout_s` [s] is the deadline of each of its phases."""
        asked = [rank.send.remote() for rank in self.ranks]
        # Four phases: gathering, and three in which rank 0 waits for engines, each of which has its own deadline there.
        return get(asked, who=self._who, timeout_s=4 * timeout_s, doing="sending the weights")[0]

    def _sharded(self, method: str, role: str, batch: Packed, *args: Any, **options: Any) -> tuple[list[Shard], list[Any]]:
        cut = shards(batch, ranks=len(self.ranks) // self._sharing, **self._cut)
        stored = [ray.put(sent(shard)) for shard in cut]
        references = [
            rank.call.remote(method, role, stored[index // self._sharing], *args, **options) for index, rank in enumerate(self.ranks)
        ]
        return cut, references

    def logp(self, role: str, batch: Packed) -> Tensor:
        """Log-probabilities [nats] of every action token, [T]."""
        return self._per_token("logp", role, batch)

    def values(self, role: str, batch: Batch) -> Tensor:
        """Values of the state before every token, [T]."""
        return self._per_token("values", role, batch)

    def _per_token(self, method: str, role: str, batch: Packed) -> Tensor:
        cut, references = self._sharded(method, role, batch)
        return unshard(cut, get(references, who=self._who)[:: self._sharing], cu_seqlens=batch.cu_seqlens)

    def update_policy(self, role: str, scored: Scored, algo: Algorithm) -> StepResult:
        """One optimiser step of a policy."""
        return self._update("update_policy", role, scored, algo)

    def update_critic(self, role: str, scored: Scored, algo: ActorCritic) -> StepResult:
        """One optimiser step of a critic."""
        return self._update("update_critic", role, scored, algo)

    def _update(self, method: str, role: str, scored: Packed, algo: Algorithm | ActorCritic | Offline) -> StepResult:
        _, references = self._sharded(method, role, scored, algo)
        results: list[StepResult] = get(references, who=self._who)
        return StepResult(
            metrics=_added([result.metrics for result in results]),
            grad_norm=results[0].grad_norm,
            lr=results[0].lr,
            applied=results[0].applied,
        )

    def update_offline(self, role: str, rows: Packed, algo: Offline) -> StepResult:
        """One optimiser step over labelled rows."""
        return self._update("update_offline", role, rows, algo)

    def evaluate_offline(self, role: str, rows: Packed, algo: Offline) -> dict[str, float]:
        """The figures of such a step, without one."""
        _, references = self._sharded("evaluate_offline", role, rows, algo)
        return _added(get(references, who=self._who))

    def scores(self, role: str, rows: Packed) -> Tensor:
        """A reward model's score of every row [reward], [N]."""
        cut, references = self._sharded("scores", role, rows)
        return unshard_rows(cut, get(references, who=self._who)[:: self._sharing])

    def keep_statistics(self, role: str, scores: Tensor) -> None:
        """Let a reward model's configuration have the mean and deviation of its scores."""
        get([rank.call.remote("keep_statistics", role, scores) for rank in self.ranks], who=self._who)

    def top_logp(self, role: str, rows: Packed, *, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """A teacher's likeliest tokens and their log-probabilities [nats] at every action token, [T, K] each."""
        cut, references = self._sharded("top_logp", role, rows, k=k, temperature=temperature)
        found = get(references, who=self._who)[:: self._sharing]
        tokens, logp = (unshard(cut, [one[part] for one in found], cu_seqlens=rows.cu_seqlens) for part in range(2))
        return tokens, logp

    def export(self, role: str, directory: str, *, average: bool = False) -> None:
        """Write a role's model in the Hugging Face layout, or the moving average of its weights; rank 0 writes."""
        get([rank.call.remote("export", role, directory, average=average) for rank in self.ranks], who=self._who)

    def sleep(self) -> int:
        """Give up the device's memory of every role until a call needs it."""
        return sum(get([rank.call.remote("sleep") for rank in self.ranks], who=self._who))

    def save(self, directory: str) -> None:
        """Every rank copies its share and goes on."""
        self._written = {}
        get([rank.call.remote("save", directory) for rank in self.ranks], who=self._who)

    def saved(self, wait: bool) -> list[Outcome] | None:
        """What became of the last save on every rank, once; None while one of them is writing."""
        asked = [rank for rank in range(len(self.ranks)) if rank not in self._written]
        answers = get([self.ranks[rank].call.remote("saved", wait) for rank in asked], who=self._who)
        self._written |= {rank: answer for rank, answer in zip(asked, answers, strict=True) if answer is not None}
        return list(self._written.values()) if len(self._written) == len(self.ranks) else None

    def restore(self, directory: str) -> None:
        """Take up a checkpoint."""
        get([rank.call.remote("restore", directory) for rank in self.ranks], who=self._who)

    def close(self) -> None:
        """End the processes; what they hold goes with them."""
        for rank in self.ranks:
            ray.kill(rank)
