"""Every training command by its name: the configuration it begins with, whichever loop carries it out."""

from collections.abc import Mapping

from hone.launch.config import PolicyGradientConfig, default_config
from hone.launch.offline_config import OfflineConfig, default_offline
from hone.launch.verbs import OFFLINE, VERBS

AnyConfig = PolicyGradientConfig | OfflineConfig

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


def defaults(verb: str, loss: str | None = None) -> AnyConfig:
    """The configuration of a command, and of its `--loss` where it has several, before any recipe, file or flag."""
    return default_offline(verb, loss) if verb in OFFLINE else default_config(verb)


def defaults_of(config: AnyConfig) -> AnyConfig:
    """The configuration that a command like this one begins with."""
    return defaults(config.verb, getattr(config, "loss", None))


def training_verbs() -> list[str]:
    """Every command that trains."""
    return [*VERBS, *OFFLINE]


def implied_backend(config: AnyConfig, said: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """What follows for where a run takes place: the reason, and settings with their values.

    One rank without DeepSpeed needs no Ray: an offline program then begins in seconds, in this process. In one process nothing is sharded.
    """
    asked = [name for name, alone in _ALONE.items() if said.get(name, alone) != alone]
    if isinstance(config, OfflineConfig) and "run.backend" not in said and asked:
        return f"as {asked[0]}", {"run.backend": "ray"}
    if said.get("run.backend", config.run.backend) == "local":
        return "run.backend local", {"ds.zero_stage": 0}
    return "", {}
