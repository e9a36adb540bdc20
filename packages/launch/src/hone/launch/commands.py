"""Every command with settings by its name: the configuration it begins with, whichever program carries it out."""

from collections.abc import Mapping

from hone.launch.chat_config import ChatConfig
from hone.launch.config import PolicyGradientConfig, default_config
from hone.launch.loop_config import LoopConfig, default_loop
from hone.launch.loop_verbs import LOOPS
from hone.launch.offline_config import OfflineConfig, default_offline
from hone.launch.using_config import UsingConfig, default_using
from hone.launch.verbs import OFFLINE, USING, VERBS

AnyConfig = PolicyGradientConfig | OfflineConfig
EveryConfig = AnyConfig | UsingConfig | LoopConfig

# Settings that more than one rank or DeepSpeed alone can carry out, and the value with which they ask for neither.
_ALONE: dict[str, object] = {
    "model.num_nodes": 1,
    "model.num_gpus_per_node": 1,
    "ds.zero_stage": 0,
    "ds.adam_offload": False,
    "ds.param_offload": False,
    "ds.zpg": 1,
    "ds.overlap_comm": False,
    "ds.ring_attn_size": 1,
    "ds.tensor_parallel_size": 1,
    "ds.deepcompile": False,
}


def defaults(verb: str, loss: str | None = None) -> EveryConfig:
    """The configuration of a command, and of its `--loss` where it has several, before any recipe, file or flag."""
    if verb == "chat":
        return ChatConfig()
    if verb in USING:
        return default_using(verb)
    if verb in LOOPS:
        return default_loop(verb, loss)
    return default_offline(verb, loss) if verb in OFFLINE else default_config(verb)


def defaults_of(config: EveryConfig) -> EveryConfig:
    """The configuration that a command like this one begins with."""
    return defaults(config.verb, getattr(config, "loss", None))


def training_verbs() -> list[str]:
    """Every command that trains."""
    return [*VERBS, *OFFLINE, *LOOPS]


def implied_backend(config: EveryConfig, said: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """What follows for where a run takes place: reason -> settings with their values.

    One rank without DeepSpeed needs no Ray: an offline program then begins in seconds, in this process. In one process nothing is sharded.
    """
    if isinstance(config, ChatConfig):
        small = "engine" not in said and said.get("model.model_name_or_path") is None
        return {"as the built-in model": {"engine": "transformers"}} if small else {}
    if isinstance(config, UsingConfig):
        own = config.verb in ("generate", "eval") and "run.backend" not in said and said.get("model.model_name_or_path") is None
        return {"as the built-in model": {"run.backend": "local"}} if own else {}
    found: dict[str, dict[str, object]] = {}
    if isinstance(config, LoopConfig) and "rollout.engine" not in said and said.get("model.model_name_or_path") is None:
        found["as the built-in model"] = {"rollout.engine": "transformers"}
    asked = [name for name, alone in _ALONE.items() if said.get(name, alone) != alone]
    if isinstance(config, OfflineConfig | LoopConfig) and "run.backend" not in said and asked:
        found[f"as {asked[0]}"] = {"run.backend": "ray"}
    elif said.get("run.backend", config.run.backend) == "local":
        found["run.backend local"] = {"ds.zero_stage": 0}
    return found
