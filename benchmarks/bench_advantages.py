"""Advantages: ours over packed tokens beside the forms peers use, a loop over time on padded rows and a dictionary of groups.

N rows, L longest response [tokens], K response tokens in all. Each side is handed the layout it works on, so padding and
packing are not timed. Ours carries every row's prompt and computes in fp64; the padded form has responses only and fp32.
"""

from collections import defaultdict

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from benchmarks.bench_roof import beside
from hone.algos.advantages import gae, group_normalised

GAMMA, LAMBDA, EPS = 0.99, 0.95, 1e-6
PROMPT_TOKENS = 128


def padded_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A_t = delta_t + gamma lambda A_{t+1} on [N, L], one column per iteration; (advantages, returns). arXiv 1506.02438 eq 16."""
    rewards, values = rewards * mask, values * mask
    following, value_after = torch.zeros(len(values)), torch.zeros(len(values))
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


@pytest.mark.parametrize(("rows", "longest"), [(256, 4096), (512, 8192)])
def test_gae(benchmark: BenchmarkFixture, rows: int, longest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # A log-normal cut at the cap: most rows are short, some fill the row, two thirds of the padded table is padding.
    responses = (longest / 4 * torch.randn(rows, generator=generator).mul(0.8).exp()).long().clamp(1, longest)
    responses[0] = longest
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), (responses + PROMPT_TOKENS).cumsum(0)])
    position = torch.arange(int(bounds[-1])) - torch.repeat_interleave(bounds[:-1], bounds.diff())
    action_mask = position >= PROMPT_TOKENS
    rewards = torch.randn(len(position), generator=generator)
    values = torch.randn(len(position), generator=generator)

    def padded(per_token: Tensor) -> Tensor:
        return pad_sequence(list(per_token[action_mask].split(responses.tolist())), batch_first=True)

    mask, table_rewards, table_values = padded(torch.ones_like(rewards)), padded(rewards), padded(values)

    def ours() -> tuple[Tensor, Tensor]:
        return gae(rewards, values, action_mask, bounds, gamma=GAMMA, lambd=LAMBDA)

    def loop() -> tuple[Tensor, Tensor]:
        return padded_gae(table_rewards, table_values, mask)

    for packed, table in zip(ours(), loop(), strict=True):
        assert_close(packed[action_mask], table[mask.bool()], rtol=1e-4, atol=1e-4)
    # The floor of GAE is 16 bytes per token: rewards and values read, advantages and returns written.
    source = torch.stack([rewards[action_mask], values[action_mask]])
    target = torch.empty_like(source)
    benchmark.extra_info["padding"] = 1 - float(mask.mean())
    beside(benchmark, ours, peers={"padded_loop": loop}, roof=lambda: target.copy_(source), rounds=5)
    benchmark.extra_info["ours_ns_per_response_token"] = 1e6 * benchmark.extra_info["ours_ms"] / int(responses.sum())


@pytest.mark.parametrize(("groups", "group_size"), [(64, 8), (1024, 16)])
def test_group_statistics(benchmark: BenchmarkFixture, groups: int, group_size: int) -> None:
    scores = torch.randn(groups * group_size, generator=torch.Generator().manual_seed(0))
    group = torch.arange(groups).repeat_interleave(group_size)
    names = group.tolist()

    def ours() -> Tensor:
        return group_normalised(scores, group, eps=EPS)

    peers = {"dictionary": lambda: grouped_by_dictionary(scores, names), "reshape": lambda: grouped_by_reshape(scores, group_size)}
    for peer in peers.values():
        assert_close(ours(), peer(), rtol=1e-4, atol=1e-5)
    target = torch.empty_like(scores)
    beside(benchmark, ours, peers=peers, roof=lambda: target.copy_(scores), rounds=7)
