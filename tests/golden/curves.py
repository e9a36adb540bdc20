"""Ten steps of the loop on a small model, as text: recorded in this process, and replayed on other learners with the same data.

The model is random, its reward the share of digits in a response, and every rollout is cut into two optimiser steps, so that
ratios leave one and clipping can happen. `record` samples; `replay` trains other learners on the very samples of a recording.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hone.algos.batch import Scored
from hone.algos.reduce import Reduction, token_weights
from hone.launch import local
from hone.launch.builtin import BuiltinModel, write_untrained
from hone.launch.config import PlacementConfig, PolicyGradientConfig, RunConfig, TrainConfig, default_config
from hone.launch.parts import Assembly, Plan
from hone.launch.plan import make_plan
from hone.launch.prompts import prepare
from hone.launch.train import Step, train
from hone.learner.config import AdamConfig, DeepSpeedConfig
from hone.rollout.executor import Group
from hone.rollout.rewards.result import Judgement, RewardItem

STEPS = 10
COLUMNS = {
    "ppo": ("rollout/reward_mean", "train/policy_loss", "train/critic_loss", "train/kl", "train/entropy", "train/actor_grad_norm"),
    "grpo": ("rollout/reward_mean", "train/policy_loss", "train/kl", "train/entropy", "train/actor_grad_norm"),
    "on_policy_distill": ("train/policy_loss", "train/ppo_kl", "train/entropy", "train/actor_grad_norm"),
}


class DigitShare:
    """A judge that needs no process: the share of digits among a response's characters."""

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        shares = [_share(item.query.removeprefix(item.prompt)) for item in items]
        return [Judgement(reward=share, score=share, extra_logs={}) for share in shares]


def _share(response: str) -> float:
    return sum(character.isdigit() for character in response) / max(1, len(response))


def configuration(verb: str, *, zero_stage: int, ranks: int) -> PolicyGradientConfig:
    """A short run; GRPO with the sequence mean of its paper, PPO with its critic and KL in the reward."""
    base = default_config(verb)
    return dataclasses.replace(
        base,
        actor=dataclasses.replace(base.actor, adam=AdamConfig(lr=3e-3), num_gpus_per_node=ranks),
        critic=dataclasses.replace(base.critic, adam=AdamConfig(lr=3e-3), num_gpus_per_node=ranks),
        ref=dataclasses.replace(base.ref, num_gpus_per_node=ranks),
        algo=dataclasses.replace(base.algo, reduction=Reduction(over="token" if verb == "ppo" else "sequence")),
        rollout=dataclasses.replace(base.rollout, batch_size=6, n_samples_per_prompt=4, max_new_tokens=6),
        data=dataclasses.replace(base.data, max_len=64),
        ds=DeepSpeedConfig(zero_stage=zero_stage, param_dtype="fp32"),
        train=TrainConfig(batch_size=12, max_tokens_per_gpu=48, max_steps=STEPS, seed=3),
        run=RunConfig(threads=1),
        placement=PlacementConfig(),
    )


def plan(verb: str, directory: Path, *, zero_stage: int = 0, ranks: int = 1) -> Plan:
    """The plan of such a run; the model is written into `directory` if it is not there."""
    model = directory / "model"
    if not model.exists():
        write_untrained(BuiltinModel(hidden_size=32, heads=2, key_value_heads=1, max_position_embeddings=64), model)
    config = configuration(verb, zero_stage=zero_stage, ranks=ranks)
    if verb == "on_policy_distill":
        teacher = directory / "teacher"
        if not teacher.exists():
            write_untrained(BuiltinModel(hidden_size=48, heads=2, key_value_heads=1, max_position_embeddings=64, seed=1), teacher)
        config = dataclasses.replace(config, ref=dataclasses.replace(config.ref, model_name_or_path=str(teacher)))
    prompts = prepare(config.data, model=str(model), batch_size=6, num_episodes=1, seed=3, max_new_tokens=6)
    return make_plan(
        config,
        model=str(model),
        prompts=prompts,
        steps=STEPS,
        judge=DigitShare(),
        logs=directory,
        scratch=directory,
        on_start=lambda role, state: None,
        on_phase=lambda name, seconds: None,
        on_event=lambda kind, **fields: None,
        on_rejected=lambda group, reason: None,
        on_failed=lambda prompt, reason: None,
        on_retried=lambda prompt, reason: None,
        more=prompts.more,
    )


def _steps(plan: Plan, parts: Assembly) -> list[Step]:
    config = plan.config
    steps = train(config.algo, parts, batch_size=12, max_epochs=1, max_steps=STEPS, critic_only_steps=0, seed=config.train.seed)
    return list(steps)


def record(verb: str, directory: Path) -> list[Step]:
    """Ten steps sampled and trained in this process, on one thread so that sums have one order."""
    made = plan(verb, directory)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = local.build(made)
    try:
        return _steps(made, parts)
    finally:
        parts.close()
        torch.set_num_threads(threads)


class _Recorded(Assembly):
    """An assembly that acts by handing out what was recorded."""

    groups: Sequence[Sequence[Group]] = ()

    def act(self, prompts: Sequence[object], *, step: int) -> list[Group]:
        return list(self.groups[step - 1])


def replay(made: Plan, recorded: Sequence[Step], hosts: Callable[[Plan], Assembly]) -> list[Step]:
    """The same ten rollouts, trained by the learners of another assembly; nothing is published."""
    built = hosts(made)
    fields = {field.name: getattr(built, field.name) for field in dataclasses.fields(Assembly) if field.init and field.name[0] != "_"}
    parts = _Recorded(**fields | {"publisher": lambda version: {}})
    parts.groups = [step.groups for step in recorded]
    try:
        return _steps(made, parts)
    finally:
        parts.close()


def single_row() -> Scored:
    """One judged row: with two ranks, one of them has nothing to do."""
    length = 8
    action_mask = torch.arange(length) >= 3
    steady = torch.full((length,), 0.5) * action_mask
    return Scored(
        tokens=torch.arange(length) + 3,
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        position_ids=torch.arange(length),
        action_mask=action_mask,
        rollout_logp=torch.zeros(length),
        rewards=torch.zeros(length),
        version=torch.zeros(length, dtype=torch.long),
        group=torch.zeros(1, dtype=torch.long),
        truncated=torch.zeros(1, dtype=torch.bool),
        old_logp=-3 * action_mask.float(),
        ref_logp=-3 * action_mask.float(),
        values=steady,
        advantages=steady,
        returns=steady,
        weights=token_weights(action_mask, torch.tensor([0, length]), Reduction()),
    )


def text(verb: str, steps: Sequence[Step]) -> str:
    """One line a step, five decimals: below that two kinds of processor may differ."""
    lines = ["step " + " ".join(COLUMNS[verb])]
    lines += [f"{step.number} " + " ".join(f"{step.metrics[name]:.5f}" for name in COLUMNS[verb]) for step in steps]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrite the committed curves: python -m tests.golden.curves"""
    import tempfile

    for verb in COLUMNS:
        with tempfile.TemporaryDirectory() as directory:
            (Path(__file__).parent / f"{verb}.txt").write_text(text(verb, record(verb, Path(directory))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
