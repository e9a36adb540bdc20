"""The policy loss, forward and backward: ours over packed tokens beside the padded form, on the same numbers.

Each side is handed the layout it works on. Ours carries every row's prompt; the padded table has responses only. The roof
copies 10 bytes per response token, which moves the 20 that any implementation must: four fp32 numbers read, the gradient
written.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.testing import assert_close

from benchmarks.bench_advantages import PATHS, on_path, rollout
from benchmarks.bench_head import with_peak_bytes
from benchmarks.bench_roof import DEVICES, beside
from benchmarks.peers import WRITTEN_HERE, openrlhf_policy_loss, openrlhf_release
from hone.algos.policy_losses import clipped_surrogate

CLIP = 0.2


class PaddedSurrogate(torch.nn.Module):
    """-min(rho A, clip(rho) A) averaged over the mask, with clip fraction and KL. arXiv 1707.06347 eq 7."""

    def forward(self, logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, share of clipped tokens, mean of old_logp - logp)."""
        difference = logp - old_logp
        ratio = difference.clamp(-20, 20).exp()
        free, bounded = ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
        figures = (-torch.min(free, bounded), (bounded < free).float(), -difference.detach())
        loss, clipped, kl = ((figure * mask).sum() / mask.sum() for figure in figures)
        return loss, clipped, kl


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("rows", "longest"), [(256, 4096), (1024, 8192)])
def test_clipped_surrogate(benchmark: BenchmarkFixture, rows: int, longest: int, path: str, device: str) -> None:
    batch = rollout(rows, longest, device)
    mask, tokens = batch.mask, int(batch.mask.sum())
    old_logp, advantages = -batch.normal().abs(), batch.normal()
    logp = (old_logp + 0.2 * batch.normal()).requires_grad_()
    weights = batch.action_mask / tokens
    table_logp = batch.padded(logp.detach()).requires_grad_()
    table_old_logp, table_advantages = batch.padded(old_logp), batch.padded(advantages)
    theirs = openrlhf_policy_loss()
    benchmark.extra_info["peer"] = WRITTEN_HERE if theirs is None else openrlhf_release()
    padded_loss = PaddedSurrogate() if theirs is None else theirs(clip_eps_low=CLIP, clip_eps_high=CLIP)

    def ours() -> list[Tensor]:
        loss = clipped_surrogate(logp, old_logp, advantages, weights, batch.action_mask, clip_low=CLIP, clip_high=CLIP)
        figures = [loss.total.detach(), loss.metrics["ppo_clip_ratio"], loss.metrics["ppo_kl"]]
        return [*figures, *torch.autograd.grad(loss.total, logp)]

    def padded() -> list[Tensor]:
        loss, clipped, kl, *_ = padded_loss(table_logp, table_old_logp, table_advantages, mask)
        return [loss.detach(), clipped, kl, *torch.autograd.grad(loss, table_logp)]

    with on_path(path, logp, old_logp, advantages, weights):
        *figures, gradient = ours()
        *table_figures, table_gradient = padded()
        assert_close(figures, table_figures, rtol=1e-4, atol=1e-5)
        assert_close(gradient[batch.action_mask], table_gradient[mask.bool()], rtol=1e-5, atol=1e-12)
        assert (gradient[~batch.action_mask] == 0).all()
        if device == "cpu":
            _, peak = with_peak_bytes(ours)
            given = sum(tensor.nbytes for tensor in (logp, old_logp, advantages, weights, batch.action_mask))
            benchmark.extra_info["peak_over_input"] = peak / given
            assert peak < 4 * given
        source = torch.ones(5 * tokens // 2, device=device)
        target = torch.empty_like(source)
        benchmark.extra_info["padding"] = 1 - float(mask.mean())
        beside(benchmark, ours, peers={"padded": padded}, roof=lambda: target.copy_(source), rounds=5, calls=10, device=device)
    benchmark.extra_info["ours_ns_per_response_token"] = 1e6 * benchmark.extra_info["ours_ms"] / tokens
