"""Advantages: ours over packed tokens beside the forms peers use, a loop over time on padded rows and a dictionary of groups.

N rows, L longest response [tokens], K response tokens in all. Each side is handed the layout it works on, so padding and
packing are not timed. Ours carries every row's prompt and computes in fp64; the padded form has responses only and fp32.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from benchmarks.bench_head import with_peak_bytes
from benchmarks.bench_roof import DEVICES, beside
from benchmarks.peers import WRITTEN_HERE, openrlhf_gae, openrlhf_release
from hone.algos.advantages import gae, group_normalised
from hone.algos.kernels import kernels_for, plain_only

GAMMA, LAMBDA, EPS = 0.99, 0.95, 1e-6
PROMPT_TOKENS = 128
PATHS = {"plain": plain_only, "native": nullcontext}


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Rows of a prompt and a response each; `padded` makes the [N, L] table of a per-token tensor's responses."""

    bounds: Tensor
    action_mask: Tensor
    mask: Tensor
    padded: Callable[[Tensor], Tensor]
    generator: torch.Generator

    def normal(self) -> Tensor:
        """A standard normal number per token."""
        return torch.randn(self.action_mask.numel(), generator=self.generator).to(self.mask.device)


def rollout(rows: int, longest: int, device: str) -> Rollout:
    """A log-normal cut at the cap: most rows are short, some fill the row, two thirds of the padded table is padding."""
    generator = torch.Generator().manual_seed(0)
    responses = (longest / 4 * torch.randn(rows, generator=generator).mul(0.8).exp()).long().clamp(1, longest)
    responses[0] = longest
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), (responses + PROMPT_TOKENS).cumsum(0)])
    position = torch.arange(int(bounds[-1])) - torch.repeat_interleave(bounds[:-1], bounds.diff())
    action_mask = (position >= PROMPT_TOKENS).to(device)

    def padded(per_token: Tensor) -> Tensor:
        return pad_sequence(list(per_token[action_mask].split(responses.tolist())), batch_first=True)

    mask = padded(torch.ones(action_mask.numel(), device=device))
    return Rollout(bounds=bounds.to(device), action_mask=action_mask, mask=mask, padded=padded, generator=generator)


def on_path(path: str, *per_token: Tensor) -> AbstractContextManager[None]:
    """The context that times the path asked for; skips where it is not installed."""
    if path == "native" and kernels_for(*per_token) is None:
        pytest.skip("no native path here: install hone-algos[fast]")
    return PATHS[path]()


def padded_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A_t = delta_t + gamma lambda A_{t+1} on [N, L], one column per iteration; (advantages, returns). arXiv 1506.02438 eq 16."""
    rewards, values = rewards * mask, values * mask
    following, value_after = values.new_zeros(len(values)), values.new_zeros(len(values))
    backwards = []
    for t in reversed(range(values.shape[1])):
        following = rewards[:, t] + GAMMA * value_after - values[:, t] + GAMMA * LAMBDA * following
        value_after = values[:, t]
        backwards.append(following)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


def grouped_by_dictionary(scores: Tensor, group: list[int]) -> Tensor:
    """(r_i - mean) / (std + eps), each group's scores gathered in a list. arXiv 2402.03300 section 4.1.2."""
    of_group = defaultdict(list)
    for row, name in enumerate(group):
        of_group[name].append(scores[row])
    stacked = {name: torch.stack(members) for name, members in of_group.items()}
    statistics = {name: (members.mean(), members.std()) for name, members in stacked.items()}
    return torch.stack([(scores[row] - statistics[name][0]) / (statistics[name][1] + EPS) for row, name in enumerate(group)])


def grouped_by_reshape(scores: Tensor, group_size: int) -> Tensor:
    """The same where every group is whole and its rows stand together, which ours does not ask for."""
    table = scores.view(-1, group_size)
    return ((table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + EPS)).view(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("rows", "longest"), [(256, 4096), (1024, 8192)])
def test_gae(benchmark: BenchmarkFixture, rows: int, longest: int, path: str, device: str) -> None:
    batch = rollout(rows, longest, device)
    rewards, values, mask = batch.normal(), batch.normal(), batch.mask
    table_rewards, table_values = batch.padded(rewards), batch.padded(values)
    theirs = openrlhf_gae()
    benchmark.extra_info["peer"] = WRITTEN_HERE if theirs is None else openrlhf_release()

    def ours() -> tuple[Tensor, Tensor]:
        return gae(rewards, values, batch.action_mask, batch.bounds, gamma=GAMMA, lambd=LAMBDA)

    def loop() -> tuple[Tensor, Tensor]:
        if theirs is None:
            return padded_gae(table_rewards, table_values, mask)
        return theirs(None, table_values, table_rewards, mask, GAMMA, LAMBDA)

    with on_path(path, rewards, values):
        for packed, table in zip(ours(), loop(), strict=True):
            assert_close(packed[batch.action_mask], table[mask.bool()], rtol=1e-4, atol=1e-4)
        if device == "cpu":
            _, peak = with_peak_bytes(lambda: [*ours()])
            given = sum(tensor.nbytes for tensor in (rewards, values, batch.action_mask))
            benchmark.extra_info["peak_over_input"] = peak / given
            assert peak < 4 * given + 2**26  # results included; the plain path's blocks do not grow with the input
        # The floor of GAE is 16 bytes per token: rewards and values read, advantages and returns written.
        source = torch.stack([rewards[batch.action_mask], values[batch.action_mask]])
        target = torch.empty_like(source)
        benchmark.extra_info["padding"] = 1 - float(mask.mean())
        beside(benchmark, ours, peers={"padded_loop": loop}, roof=lambda: target.copy_(source), rounds=5, calls=10, device=device)
    benchmark.extra_info["ours_ns_per_response_token"] = 1e6 * benchmark.extra_info["ours_ms"] / int(mask.sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("groups", "group_size"), [(64, 8), (1024, 16)])
def test_group_statistics(benchmark: BenchmarkFixture, groups: int, group_size: int, device: str) -> None:
    scores = torch.randn(groups * group_size, generator=torch.Generator().manual_seed(0)).to(device)
    group = torch.arange(groups, device=device).repeat_interleave(group_size)
    names = group.tolist()

    def ours() -> Tensor:
        return group_normalised(scores, group, eps=EPS)

    peers = {"dictionary": lambda: grouped_by_dictionary(scores, names), "reshape": lambda: grouped_by_reshape(scores, group_size)}
    for peer in peers.values():
        assert_close(ours(), peer(), rtol=1e-4, atol=1e-5)
    target = torch.empty_like(scores)
    beside(benchmark, ours, peers=peers, roof=lambda: target.copy_(scores), rounds=5, calls=10, device=device)
