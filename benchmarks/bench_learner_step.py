"""One whole optimiser step of a small model on 64 ragged sequences: ours beside the same step in plain transformers, padded.

Forward, clipped policy loss, backward, clipping by norm, AdamW; fp32, one process. The peers pad on the right, as OpenRLHF and TRL
do without packing, take full logits in fp32, OpenRLHF's own log-probability function, and leave out what the loss does not need.
`padded` pads all rows to the longest, in micro-batches that its logits allow (rows in arrival order); `padded_by_eight` pads each
micro-batch of eight rows to its own longest. The roof is the matrix products of the tokens that count: 6 operations a weight
and token in the transformer, and a token's head only where it is scored.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.utils import logging

from benchmarks.bench_roof import beside
from benchmarks.peers import openrlhf
from hone.algos.algorithms import GRPO
from hone.algos.algorithms.terms import KLPenalty
from hone.algos.batch import Scored
from hone.algos.reduce import Reduction, token_weights
from hone.learner.config import ActorConfig, AdamConfig, DeepSpeedConfig
from hone.learner.learner import Learner
from hone.learner.packing import shards
from hone.learner.roles import RoleSpec

ROWS, MAX_TOKENS, PADDED_ROWS = 64, 1024, 16
CONFIG = Qwen3Config(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=8_192,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)
CLIP = 0.2
ADAM = AdamConfig(lr=1e-4, eps=1e-3)
"""An epsilon that lets a step follow the gradient's size: with a tiny one its sign decides, which is rounding where there is none."""


def ragged() -> Scored:
    """Log-normal rows with a median of 24 tokens, at most 256; a quarter of each is a prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = (24 * torch.randn(ROWS, generator=generator).mul(0.8).exp()).long().clamp(8, 256)
    bounds = torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32)
    total, position_ids = int(bounds[-1]), torch.cat([torch.arange(length) for length in lengths.tolist()])
    mask = position_ids >= torch.repeat_interleave(lengths, lengths) // 4
    return Scored(
        tokens=torch.randint(1, CONFIG.vocab_size, (total,), generator=generator),
        cu_seqlens=bounds,
        position_ids=position_ids,
        action_mask=mask,
        rollout_logp=torch.zeros(total),
        rewards=torch.zeros(total),
        version=torch.zeros(total, dtype=torch.long),
        group=torch.arange(ROWS) // 8,
        truncated=torch.zeros(ROWS, dtype=torch.bool),
        old_logp=-9.0 + 0.1 * torch.randn(total, generator=generator),
        advantages=torch.randn(total, generator=generator),
        weights=token_weights(mask, bounds, Reduction()),
    )


def padded_step(model: torch.nn.Module, optimiser: torch.optim.Optimizer, table: dict[str, Tensor], parts: Sequence[slice]) -> list[float]:
    """The step as a trainer with padding has it; (loss, gradient norm)."""
    logprobs = openrlhf("models/utils.py", without=("deepspeed",)).log_probs_from_logits
    total = 0.0
    for part in parts:
        length = int(table["lengths"][part].max())
        own = {name: states[part, :length] for name, states in table.items() if name != "lengths"}
        logits = model(input_ids=own["tokens"], attention_mask=own["attended"]).logits.float()
        logp = logprobs(logits[:, :-1], own["tokens"][:, 1:])
        ratio = (logp - own["old_logp"][:, 1:]).exp()
        advantages = own["advantages"][:, 1:]
        surrogate = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        loss = -(surrogate * own["weights"][:, 1:]).sum()
        loss.backward()
        total += float(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return [total, float(norm)]


def test_learner_step(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    torch.manual_seed(0)
    logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path)
    rows = ragged()
    learner = Learner(
        roles={
            "policy": RoleSpec(
                kind="policy",
                model=str(tmp_path),
                config=ActorConfig(adam=ADAM, lr_warmup_ratio=0.0, lr_scheduler="constant"),
                total_steps=9,
            )
        },
        ds=DeepSpeedConfig(param_dtype="fp32"),
        backend="single",
        rank=0,
        world_size=1,
        master_addr="127.0.0.1",
        master_port=0,
        seed=0,
        max_tokens=MAX_TOKENS,
    )
    algo = GRPO(kl=KLPenalty(init_coef=0.0))

    def ours() -> list[float]:
        (shard,) = shards(rows, ranks=1, max_tokens=MAX_TOKENS)
        result = learner.update_policy("policy", shard, algo)
        return [result.metrics["policy_loss"], result.grad_norm]

    lengths = rows.lengths.tolist()
    columns = {"tokens": rows.tokens, "old_logp": rows.old_logp, "advantages": rows.advantages, "weights": rows.weights}
    table = {name: pad_sequence(list(column.split(lengths)), batch_first=True) for name, column in columns.items() if column is not None}
    table["lengths"] = rows.lengths
    table["attended"] = (torch.arange(max(lengths))[None] < rows.lengths[:, None]).long()

    def peer(rows_at_a_time: int, *, to_the_longest: bool) -> Callable[[], list[float]]:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()  # no dropout anywhere
        optimiser = torch.optim.AdamW(model.parameters(), lr=ADAM.lr, betas=ADAM.betas, eps=ADAM.eps, weight_decay=ADAM.weight_decay)
        own = copy.copy(table)
        if to_the_longest:
            own["lengths"] = torch.full_like(rows.lengths, max(lengths))
        parts = [slice(start, start + rows_at_a_time) for start in range(0, ROWS, rows_at_a_time)]
        return lambda: padded_step(model, optimiser, own, parts)

    peers = {"padded": peer(PADDED_ROWS, to_the_longest=True), "padded_by_eight": peer(8, to_the_longest=False)}
    # Two steps: the second says that the first one's update was the same, too.
    for step in range(2):
        expected = ours()
        for name, padded in peers.items():
            assert_close(padded(), expected, rtol=2e-4, atol=1e-5, msg=lambda text, name=name, step=step: f"{name}, step {step}: {text}")
    scored, inner = int(rows.action_mask.sum()), CONFIG.hidden_size
    weights = sum(parameter.numel() for name, parameter in learner.engines["policy"].module.named_weights() if ".layers." in name)
    operations = 6 * (weights * sum(lengths) + scored * inner * CONFIG.vocab_size)
    side = int((operations / 2) ** (1 / 3))
    square = torch.randn(side, side)
    benchmark.extra_info.update(
        tokens=sum(lengths), scored_tokens=scored, padding=1 - sum(lengths) / (ROWS * max(lengths)), padded_rows_at_a_time=PADDED_ROWS
    )
    beside(benchmark, ours, peers=peers, roof=lambda: square @ square, rounds=3)
