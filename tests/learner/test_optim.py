"""The learning rate as a function of the step, and which parameters decay."""

import pytest
import torch

from hone.learner.config import AdamConfig
from hone.learner.optim import adamw, learning_rate


def rates(schedule: str, *, total_steps: int, warmup_ratio: float, min_ratio: float) -> list[float]:
    return [
        learning_rate(step, peak=1.0, total_steps=total_steps, schedule=schedule, warmup_ratio=warmup_ratio, min_ratio=min_ratio)
        for step in range(total_steps + 2)
    ]


def test_golden_schedules() -> None:
    # 7 steps, warm-up ceil(0.25 * 7) = 2: 1/2, 2/2; then progress 0, 1/4, 2/4, 3/4, 1 and the floor ever after.
    assert rates("constant", total_steps=7, warmup_ratio=0.25, min_ratio=0.2) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1])
    linear = [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]
    assert rates("linear", total_steps=7, warmup_ratio=0.25, min_ratio=0.2) == pytest.approx(linear)
    half = 2**-0.5  # cos(pi / 4)
    cosine = [0.5, 1, 1, 0.2 + 0.4 * (1 + half), 0.6, 0.2 + 0.4 * (1 - half), 0.2, 0.2, 0.2]
    assert rates("cosine_with_min_lr", total_steps=7, warmup_ratio=0.25, min_ratio=0.2) == pytest.approx(cosine)


def test_no_warm_up_and_a_single_step_start_at_the_peak() -> None:
    assert rates("linear", total_steps=3, warmup_ratio=0.0, min_ratio=0.0)[:3] == pytest.approx([1.0, 0.5, 0.0])
    assert rates("cosine_with_min_lr", total_steps=1, warmup_ratio=0.03, min_ratio=0.1)[0] == 1.0


def test_vectors_are_exempt_from_decay() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.RMSNorm(2))
    optimiser = adamw(layer.named_parameters(), AdamConfig(lr=0.1, weight_decay=0.5))
    decay = {id(parameter): group["weight_decay"] for group in optimiser.param_groups for parameter in group["params"]}
    named = dict(layer.named_parameters())
    assert {name: decay[id(parameter)] for name, parameter in named.items()} == {"0.weight": 0.5, "0.bias": 0.0, "1.weight": 0.0}
