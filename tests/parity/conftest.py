"""The peers as fixtures; without `.peers/` the tests that ask for one are skipped."""

from types import SimpleNamespace

import pytest

from tests.parity import peers

OPENRLHF = {
    "loss": "openrlhf.models.loss",
    "utils": "openrlhf.models.utils",
    "experience_maker": "openrlhf.trainer.ppo_utils.experience_maker",
    "kl_controller": "openrlhf.trainer.ppo_utils.kl_controller",
    "length_penalty": "openrlhf.trainer.ppo_utils.length_penalty",
    "samples_generator": "openrlhf.trainer.ppo_utils.samples_generator",
    "dpo": "openrlhf.trainer.dpo_trainer",
    "ppo": "openrlhf.trainer.ppo_trainer",
}
TRL = {
    "grpo": "trl.trainer.grpo_trainer",
    "rloo": "trl.trainer.rloo_trainer",
    "dpo": "trl.trainer.dpo_trainer",
    "kto": "trl.trainer.kto_trainer",
    "reward": "trl.trainer.reward_trainer",
    "distillation": "trl.trainer.distillation_trainer",
    "utils": "trl.trainer.utils",
    "rewards": "trl.rewards.other_rewards",
    "cpo": "trl.experimental.cpo.cpo_trainer",
    "orpo": "trl.experimental.orpo.orpo_trainer",
    "gkd": "trl.experimental.gkd.gkd_trainer",
    "gmpo": "trl.experimental.gmpo.gmpo_trainer",
    "self_distillation": "trl.experimental.sdpo.loss_utils",
}


@pytest.fixture(scope="session")
def openrlhf() -> SimpleNamespace:
    """OpenRLHF's modules, by short names."""
    return _modules("openrlhf", OPENRLHF)


@pytest.fixture(scope="session")
def trl() -> SimpleNamespace:
    """TRL's modules, by short names."""
    modules = _modules("trl", TRL)
    # Asked at every call: whether the GPU kernels may be used.
    modules.utils.is_triton_available = lambda: False
    return modules


def _modules(peer: str, names: dict[str, str]) -> SimpleNamespace:
    release = f"{peer}-{peers.RELEASES[peer]}"
    if not (peers.DIRECTORY / f"{release}.dist-info").is_dir():
        pytest.skip(f"{release} is not in {peers.DIRECTORY.name}/; `just peers` puts it there")
    return SimpleNamespace(**dict(zip(names, peers.load(*names.values()), strict=True)))
