"""Tiny models and batches the learner's tests share: two architectures, tied and untied, made from a seed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig
from transformers.utils import logging

from hone.algos.batch import Batch, Scored
from hone.algos.reduce import Reduction, token_weights
from hone.learner.config import ActorConfig, AdamConfig, CriticConfig, DeepSpeedConfig, MuonConfig, RefConfig
from hone.learner.heads import TokenHead
from hone.learner.learner import Learner
from hone.learner.roles import RoleSpec

VOCABULARY = 61
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large, so that log-probabilities differ by far more than rounding
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3-tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SHAPE, tie_word_embeddings=False),
}
MIXTURE = Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, tie_word_embeddings=False)


def save_model(directory: Path, kind: str, *, seed: int = 0) -> str:
    return save_config(directory, CONFIGS[kind], seed=seed)


def save_config(directory: Path, config: PretrainedConfig, *, seed: int = 0) -> str:
    torch.manual_seed(seed)
    logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return str(directory)


def make_batch(lengths: list[int], *, seed: int = 0, temperature: float = 0.8) -> Batch:
    """Random rows; each opens with two tokens that are no actions, and one later token is none either."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    starts = [sum(lengths[:row]) for row in range(len(lengths))]
    mask = torch.ones(total, dtype=torch.bool)
    for start, length in zip(starts, lengths, strict=True):
        mask[start : start + min(2, length)] = False
        if length > 5:
            mask[start + 4] = False
    return Batch(
        tokens=torch.randint(0, VOCABULARY, (total,), generator=generator),
        cu_seqlens=torch.tensor([*starts, total], dtype=torch.int32),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        action_mask=mask,
        rollout_logp=torch.zeros(total),
        rewards=torch.zeros(total),
        version=torch.zeros(total, dtype=torch.long),
        group=torch.arange(len(lengths)),
        truncated=torch.zeros(len(lengths), dtype=torch.bool),
        temperature=temperature,
    )


def score(batch: Batch, *, seed: int = 1) -> Scored:
    """Random advantages, returns and old values on the mask, token-mean weights, and old log-probabilities near the usual."""
    generator = torch.Generator().manual_seed(seed)
    total = batch.tokens.shape[0]
    draw = [torch.randn(total, generator=generator) * batch.action_mask for _ in range(3)]
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    fields["old_logp"] = fields["old_logp"] if fields["old_logp"] is not None else -4.0 + 0.1 * draw[1]
    weights = token_weights(batch.action_mask, batch.cu_seqlens, Reduction())
    return Scored(**{**fields, "values": draw[1]}, advantages=draw[0], returns=draw[2], weights=weights)


def make_learner(
    roles: dict[str, str],
    *,
    backend: str = "single",
    stage: int = 0,
    rank: int = 0,
    world_size: int = 1,
    port: int = 0,
    max_tokens: int = 64,
    dtype: str = "fp32",
    gradient_checkpointing: bool = False,
    lr: float = 1e-2,
    ring: int = 1,
    head_stride: int | None = None,
    max_skipped_steps: int = 0,
    ema_beta: float | None = None,
    optim: str = "adam",
    ds: Mapping[str, Any] | None = None,
    trained: Mapping[str, Any] | None = None,
    **more: Any,
) -> Learner:
    """A learner that hosts the given roles, each from its model directory; more settings of `ds`, and of all that trains."""
    more = {**(ds or {}), **more}
    adam = AdamConfig(lr=lr, weight_decay=0.01)
    common = {"adam": adam, "max_norm": 0.5, "gradient_checkpointing_enable": gradient_checkpointing}
    common |= {"max_skipped_steps": max_skipped_steps, "optim": optim, "muon": MuonConfig(lr=lr, momentum=0.8, ns_steps=4)}
    common |= trained or {}
    configs = {
        "policy": ActorConfig(**common),
        "critic": CriticConfig(**common),
        "reference": RefConfig(),
    }
    return Learner(
        roles={
            role: RoleSpec(kind=role, model=model, config=configs[role], total_steps=10, ema_beta=None if role == "reference" else ema_beta)
            for role, model in roles.items()
        },
        ds=DeepSpeedConfig(zero_stage=stage, param_dtype=dtype, ring_attn_size=ring, ring_attn_head_stride=head_stride, **more),
        backend=backend,
        rank=rank,
        world_size=world_size,
        master_addr="127.0.0.1",
        master_port=port,
        seed=0,
        max_tokens=max_tokens,
    )


def copies(learner: Learner) -> int:
    """Ranks, or groups of ranks that hold one model, that share a step's rows among them."""
    return learner.world_size if learner.parallel is None else learner.parallel.copies


def own(learner: Learner) -> int:
    """Which of them the calling rank is of."""
    return learner.rank * copies(learner) // learner.world_size


def in_chunks(head: TokenHead, tokens: int) -> None:
    """From here on the head takes `tokens` at a time."""
    head.chunk_bytes = tokens * head.words * head.weight.element_size()
