"""What TRL's trainer methods read of their trainer, and nothing more: they are called unbound, on these.

One process, training mode, no gradient accumulation, no model: `_get_per_token_logps_and_entropies` hands out what a test gives.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.parity.cases import Case

TRAINING = SimpleNamespace(training=True)


def same(value: Tensor, **_: object) -> Tensor:
    """Gathering and reducing over one process."""
    return value


def accelerator() -> SimpleNamespace:
    """One process on the CPU, at the end of an accumulation window."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        is_main_process=True,
        sync_gradients=True,
        gather=same,
        gather_for_metrics=same,
        reduce=same,
        pad_across_processes=same,
    )


def grpo(**settings: object) -> SimpleNamespace:
    """A GRPOTrainer for `_compute_loss`; `args` of its configuration may be given flat."""
    arguments = {
        name: settings.pop(name, default)
        for name, default in {
            "delta": None,
            "use_bias_correction_kl": False,
            "sapo_temperature_pos": 1.0,
            "sapo_temperature_neg": 1.05,
            "vespo_k_pos": 2.0,
            "vespo_k_neg": 3.0,
            "vespo_lambda_pos": 3.0,
            "vespo_lambda_neg": 2.0,
            "steps_per_generation": 1,
            "entropy_target": 0.0,
            "entropy_coef_delta": 0.0,
            "entropy_coef_min": 0.0,
            "entropy_coef_max": 1.0,
        }.items()
    }
    own = {
        "loss_type": "dapo",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "importance_sampling_level": "token",
        "max_completion_length": 16,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
        "_entropy_window_stats": None,
        "current_gradient_accumulation_steps": 1,
    }
    return SimpleNamespace(
        **(own | settings),
        args=SimpleNamespace(**arguments),
        model=TRAINING,
        accelerator=accelerator(),
        _metrics={"train": defaultdict(list)},
    )


def grpo_loss(trainer_class: type, trainer: SimpleNamespace, given: Case, **inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The trainer's loss as a function of the padded log-probabilities; entropies are those in `inputs`, or zero."""
    entropies = inputs.pop("entropies", torch.zeros_like(given.logp))
    batch = {
        "prompt_ids": torch.zeros(given.mask.shape[0], 0, dtype=torch.long),
        "prompt_mask": torch.zeros(given.mask.shape[0], 0, dtype=torch.long),
        "completion_ids": torch.zeros(given.mask.shape, dtype=torch.long),
        "completion_mask": given.valid.long(),
        "tool_mask": given.mask.long(),
        "advantages": given.advantages,
        "old_per_token_logps": given.old_logp,
        "num_items_in_batch": given.mask.sum(),
    } | inputs

    def loss(logp: Tensor) -> Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, entropies, None)
        return trainer_class._compute_loss(trainer, None, batch)

    return loss


def score(
    module: SimpleNamespace,
    trainer_class: type,
    monkeypatch: pytest.MonkeyPatch,
    given: Case,
    rewards: Tensor,
    *,
    generations: int,
    **settings: object,
) -> dict[str, Tensor]:
    """The batch `_generate_and_score_completions` makes of these rewards (rows x reward functions) and log-probabilities."""
    monkeypatch.setattr(module, "gather_object", same)
    monkeypatch.setattr(module, "gather", same, raising=False)
    monkeypatch.setattr(module, "disable_gradient_checkpointing", lambda *_: nullcontext())
    lengths = given.valid.sum(1).tolist()
    completions = [[1] * length for length in lengths]
    functions = list(range(rewards.shape[1]))
    sampled = [row[:length].tolist() for row, length in zip(given.rollout_logp, lengths, strict=True)]
    tools = [row[:length].long().tolist() for row, length in zip(given.mask, lengths, strict=True)]
    everything = ([[0]] * len(lengths), completions, tools, completions, sampled, {}, None, [])
    own = {
        "beta": 0.0,
        "scale_rewards": "group",
        "multi_objective_aggregation": "sum_then_normalize",
        "normalize_advantages": False,
        "reward_clip_range": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "vllm_importance_sampling_mode": "sequence_mask",
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": 3.0,
        "num_iterations": 1,
        "reward_weights": torch.ones(len(functions)),
    }
    trainer = SimpleNamespace(
        **(own | settings),
        accelerator=accelerator(),
        model=TRAINING,
        ref_model=SimpleNamespace(training=False),
        environment_factories=None,
        environments=[],
        tools=[],
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        log_multimodal=False,
        num_generations=generations,
        reward_funcs=functions,
        reward_func_names=[str(function) for function in functions],
        args=SimpleNamespace(
            per_device_train_batch_size=len(lengths),
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _metrics={"train": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list), "extra": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda _: everything if "grpo" in module.__name__ else everything[:2] + everything[3:4],
        _calculate_rewards=lambda *_: rewards,
    )
    by_model = {id(trainer.model): given.old_logp, id(trainer.ref_model): given.ref_logp}
    trainer._get_per_token_logps_and_entropies = lambda model, *_, **__: (by_model[id(model)], None, None)
    return trainer_class._generate_and_score_completions(trainer, [{"prompt": ""}] * len(lengths))
