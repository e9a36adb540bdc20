"""Names that users' fingers know: OpenRLHF's that live elsewhere here, flat and foreign names, and the closest of ours.

Three kinds: an alias is translated and used; a renamed flag is answered with its new name; a flag without counterpart is
answered with the reason. A fourth, whose answer depends on the value, stands in `foreign.py`.
Reference: OpenRLHF 0.11 and its flat names up to 0.9, verl, TRL.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from hone.launch.foreign import answer

REPLACED_BY_PACKING = "samples are always packed, without padding; train.max_tokens_per_gpu caps a micro-batch"
PLACEMENT = "say which roles share processes with --placement.policy, .critic, .reference and .engine"
RECORDED = "every run records all metrics in its own directory, offline; see --run.dir"


@dataclass(frozen=True, kw_only=True)
class Alias:
    """Another name for one setting or several; `spread` hands the i-th value to the i-th target instead of each value to all."""

    targets: tuple[str, ...]
    spread: bool = False


ALIASES = {
    "actor.eps_clip": Alias(targets=("algo.clip.low", "algo.clip.high")),
    "actor.eps_clip_low_high": Alias(targets=("algo.clip.low", "algo.clip.high"), spread=True),
    "actor.dual_clip": Alias(targets=("algo.clip.dual",)),
    "actor.entropy_coef": Alias(targets=("algo.entropy_coef",)),
    "critic.value_clip": Alias(targets=("algo.value_clip",)),
    "algo.advantage.is_correction_threshold": Alias(targets=("algo.correction.low", "algo.correction.high"), spread=True),
    "debug": Alias(targets=("run.debug",)),
    "resume": Alias(targets=("ckpt.resume",)),
}

_OPTIMISER = ("optim", "lr_scheduler", "lr_warmup_ratio", "min_lr_ratio", "max_norm")
_OF_ADAM, _OF_MUON = ("lr", "betas", "eps", "weight_decay"), ("lr", "momentum", "ns_steps", "nesterov")

OFFLINE_ALIASES = {
    **{name: Alias(targets=(f"model.{name}",)) for name in _OPTIMISER},
    **{f"adam.{name}": Alias(targets=(f"model.adam.{name}",)) for name in _OF_ADAM},
    **{f"muon.{name}": Alias(targets=(f"model.muon.{name}",)) for name in _OF_MUON},
    **{f"model.{name}": Alias(targets=(f"algo.{name}",)) for name in ("beta", "label_smoothing", "nll_loss_coef")},
    "model.loss_type": Alias(targets=("loss",)),
    "loss_type": Alias(targets=("loss",)),
    "model.pretrain_mode_enable": Alias(targets=("data.pretrain_mode",)),
}
"""Names of OpenRLHF's offline programs, understood where the settings they stand for are there."""


ALL_ALIASES = ALIASES | OFFLINE_ALIASES


def aliases(known: Collection[str]) -> dict[str, Alias]:
    """Every alias that stands for settings there are."""
    return {name: one for name, one in ALL_ALIASES.items() if all(target in known for target in one.targets)}


RENAMED = {
    # OpenRLHF up to 0.9, flat
    "pretrain": "actor.model_name_or_path",
    "critic_pretrain": "critic.model_name_or_path",
    "ref_pretrain": "ref.model_name_or_path",
    "prompt_data": "data.prompt_dataset",
    "prompt_data_probs": "data.prompt_probs",
    "prompt_split": "data.prompt_split",
    "tokenizer_chat_template": "data.tokenizer_chat_template",
    "chat_template_kwargs": "data.chat_template_kwargs",
    "input_key": "data.input_key",
    "label_key": "data.label_key",
    "image_key": "data.image_key",
    "apply_chat_template": "data.apply_chat_template",
    "input_template": "data.input_template",
    "max_len": "data.max_len",
    "max_samples": "data.max_samples",
    "max_new_tokens": "rollout.max_new_tokens",
    "generate_max_len": "rollout.max_new_tokens",
    "rollout_batch_size": "rollout.batch_size",
    "n_samples_per_prompt": "rollout.n_samples_per_prompt",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "train_batch_size": "train.batch_size",
    "train_max_tokens_per_gpu": "train.max_tokens_per_gpu",
    "micro_train_batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "ppo_micro_batch_size_per_gpu": "train.micro_batch_size",
    "max_epochs": "train.max_epochs",
    "num_episodes": "train.num_episodes",
    "seed": "train.seed",
    "gamma": "algo.advantage.gamma",
    "lambd": "algo.advantage.lambd",
    "eps_clip": "actor.eps_clip",
    "eps_clip_low_high": "actor.eps_clip_low_high",
    "dual_clip": "actor.dual_clip",
    "value_clip": "critic.value_clip",
    "freezing_actor_steps": "critic.freezing_steps",
    "init_kl_coef": "algo.kl.init_coef",
    "kl_estimator": "algo.kl.estimator",
    "use_kl_loss": "algo.kl.use_loss",
    "entropy_loss_coef": "actor.entropy_coef",
    "remote_rm_url": "reward.remote_url",
    "algo.dynamic_filtering_enable": "rollout.dynamic_filtering",
    "algo.dynamic_filtering_range": "rollout.dynamic_filtering_range",
    "dynamic_filtering": "rollout.dynamic_filtering",
    "dynamic_filtering_reward_range": "rollout.dynamic_filtering_range",
    "algorithm.filter_groups.enable": "rollout.dynamic_filtering",
    "algorithm.filter_groups.max_num_gen_batches": "rollout.dynamic_filtering_batches",
    "agent_func_path": "rollout.agent_func_path",
    "train.agent_func_path": "rollout.agent_func_path",
    "vllm_num_engines": "vllm.num_engines",
    "vllm_tensor_parallel_size": "vllm.tensor_parallel_size",
    "vllm_pipeline_parallel_size": "vllm.pipeline_parallel_size",
    "enable_prefix_caching": "vllm.enable_prefix_caching",
    "vllm_gpu_memory_utilization": "vllm.gpu_memory_utilization",
    "vllm_sync_backend": "vllm.sync_backend",
    "vllm_enable_sleep": "vllm.enable_sleep",
    "async_train": "train.async_enable",
    "async_queue_size": "train.async_queue_size",
    "partial_rollout": "train.partial_rollout_enable",
    "enforce_eager": "vllm.enforce_eager",
    "actor_num_nodes": "actor.num_nodes",
    "actor_num_gpus_per_node": "actor.num_gpus_per_node",
    "critic_num_nodes": "critic.num_nodes",
    "critic_num_gpus_per_node": "critic.num_gpus_per_node",
    "ref_num_nodes": "ref.num_nodes",
    "ref_num_gpus_per_node": "ref.num_gpus_per_node",
    "zero_stage": "ds.zero_stage",
    "deepspeed_enable_sleep": "ds.enable_sleep",
    "grad_accum_dtype": "ds.grad_accum_dtype",
    "adam_offload": "ds.adam_offload",
    "zpg": "ds.zpg",
    "overlap_comm": "ds.overlap_comm",
    "deepcompile": "ds.deepcompile",
    "enable_ema": "train.enable_ema",
    "ema_beta": "train.ema_beta",
    "ds_tensor_parallel_size": "ds.tensor_parallel_size",
    "ring_attn_size": "ds.ring_attn_size",
    "ring_head_stride": "ds.ring_attn_head_stride",
    "bf16": "ds.param_dtype",
    "param_dtype": "ds.param_dtype",
    "value_head_prefix": "ds.value_head_prefix",
    "aux_loss_coef": "actor.aux_loss_coef",
    "lora_rank": "ds.lora.rank",
    "lora_alpha": "ds.lora.alpha",
    "lora_dropout": "ds.lora.dropout",
    "target_modules": "ds.lora.target_modules",
    "load_in_4bit": "ds.load_in_4bit",
    "normalize_reward": "ds.normalize_reward",
    "use_liger_kernel": "ds.use_liger_kernel",
    "reward.normalize_enable": "ds.normalize_reward",
    "gradient_checkpointing": "actor.gradient_checkpointing_enable",
    "actor_learning_rate": "actor.adam.lr",
    "critic_learning_rate": "critic.adam.lr",
    "learning_rate": "actor.adam.lr",
    "adam_betas": "actor.adam.betas",
    "l2": "actor.adam.weight_decay",
    "lr_scheduler": "actor.lr_scheduler",
    "lr_warmup_ratio": "actor.lr_warmup_ratio",
    "max_norm": "actor.max_norm",
    "save_path": "run.dir",
    "ckpt_path": "ckpt.path",
    "load_checkpoint": "ckpt.load_enable",
    "max_ckpt_num": "ckpt.max_num",
    "save_hf_ckpt": "ckpt.save_hf",
    "save_steps": "ckpt.save_steps",
    # OpenRLHF 0.10 and later, dotted
    "ckpt.output_dir": "run.dir",
    "logger.tensorboard_dir": "run.dir",
    "actor.lr": "actor.adam.lr",
    "actor.learning_rate": "actor.adam.lr",
    "critic.lr": "critic.adam.lr",
    "critic.learning_rate": "critic.adam.lr",
    # TRL
    "model_name_or_path": "actor.model_name_or_path",
    "dataset_name": "data.prompt_dataset",
    "num_generations": "rollout.n_samples_per_prompt",
    "max_completion_length": "rollout.max_new_tokens",
    "max_length": "data.max_len",
    "num_iterations": "train.max_epochs",
    "num_train_epochs": "train.num_episodes",
    "max_steps": "train.max_steps",
    "reward_funcs": "reward.remote_url",
    "reward_weights": "reward.weights",
    "epsilon": "algo.clip.low",
    "epsilon_high": "algo.clip.high",
    "delta": "algo.clip.dual",
    "beta": "algo.kl.init_coef",
    "entropy_coef": "algo.entropy_coef",
    "max_staleness": "rollout.max_staleness",
    "vllm_importance_sampling_cap": "algo.correction.high",
    "vllm_importance_sampling_clip_max": "algo.correction.high",
    "vllm_importance_sampling_clip_min": "algo.correction.low",
    "max_grad_norm": "actor.max_norm",
    "lr_scheduler_type": "actor.lr_scheduler",
    "output_dir": "run.dir",
    # verl
    "actor_rollout_ref.model.path": "actor.model_name_or_path",
    "critic.model.path": "critic.model_name_or_path",
    "data.train_files": "data.prompt_dataset",
    "data.prompt_key": "data.input_key",
    "data.train_batch_size": "rollout.batch_size",
    "data.max_response_length": "rollout.max_new_tokens",
    "actor_rollout_ref.rollout.n": "rollout.n_samples_per_prompt",
    "actor_rollout_ref.rollout.temperature": "rollout.temperature",
    "actor_rollout_ref.rollout.top_p": "rollout.top_p",
    "actor_rollout_ref.rollout.top_k": "rollout.top_k",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "vllm.tensor_parallel_size",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "vllm.gpu_memory_utilization",
    "actor_rollout_ref.actor.optim.lr": "actor.adam.lr",
    "actor_rollout_ref.actor.clip_ratio": "actor.eps_clip",
    "actor_rollout_ref.actor.ppo_epochs": "train.max_epochs",
    "actor_rollout_ref.actor.entropy_coeff": "actor.entropy_coef",
    "actor_rollout_ref.actor.kl_loss_coef": "algo.kl.init_coef",
    "actor_rollout_ref.actor.use_kl_loss": "algo.kl.use_loss",
    "critic.optim.lr": "critic.adam.lr",
    "critic.cliprange_value": "critic.value_clip",
    "algorithm.gamma": "algo.advantage.gamma",
    "algorithm.lam": "algo.advantage.lambd",
    "algorithm.rollout_correction.rollout_is_threshold": "algo.correction.high",
    "algorithm.rollout_correction.rollout_is_batch_normalize": "algo.correction.normalize",
    "custom_reward_function.path": "reward.remote_url",
    "async_training.staleness_threshold": "rollout.max_staleness",
    "async_training.partial_rollout": "train.partial_rollout_enable",
    "trainer.nnodes": "actor.num_nodes",
    "trainer.n_gpus_per_node": "actor.num_gpus_per_node",
    "trainer.total_epochs": "train.num_episodes",
    "trainer.save_freq": "ckpt.save_steps",
    "trainer.default_local_dir": "run.dir",
}

OFFLINE_RENAMED = {
    # OpenRLHF up to 0.9, flat; TRL
    "pretrain": "model.model_name_or_path",
    "model_name_or_path": "model.model_name_or_path",
    "actor.model_name_or_path": "model.model_name_or_path",
    "actor.adam.lr": "model.adam.lr",
    "ref_pretrain": "ref.model_name_or_path",
    "teacher_model": "teacher.model_name_or_path",
    "teacher_model_name_or_path": "teacher.model_name_or_path",
    "kd_coef": "algo.kd_coef",
    "temperature": "algo.temperature",
    "beta": "algo.beta",
    "ipo": "loss",
    "model.ipo_enable": "loss",
    "label_smoothing": "algo.label_smoothing",
    "nll_loss_coef": "algo.nll_loss_coef",
    "desirable_loss_weight": "algo.desirable_loss_weight",
    "undesirable_loss_weight": "algo.undesirable_loss_weight",
    "desirable_weight": "algo.desirable_loss_weight",
    "undesirable_weight": "algo.undesirable_loss_weight",
    "dataset": "data.dataset",
    "dataset_name": "data.dataset",
    "data.prompt_dataset": "data.dataset",
    "dataset_probs": "data.dataset_probs",
    "data.prompt_probs": "data.dataset_probs",
    "dataset_split": "data.dataset_split",
    "data.prompt_split": "data.dataset_split",
    "data.train_files": "data.dataset",
    "eval_dataset": "eval.dataset",
    "data.val_files": "eval.dataset",
    "eval_steps": "eval.steps",
    "output_key": "data.output_key",
    "prompt_key": "data.prompt_key",
    "chosen_key": "data.chosen_key",
    "rejected_key": "data.rejected_key",
    "placeholder_token": "data.placeholder_token",
    "reward_tokens": "data.reward_tokens",
    "step_separator": "data.step_separator",
    "pretrain_mode": "data.pretrain_mode",
    "learning_rate": "model.adam.lr",
    "l2": "model.adam.weight_decay",
    "adam_betas": "model.adam.betas",
    "max_grad_norm": "model.max_norm",
    "lr_scheduler_type": "model.lr_scheduler",
    "gradient_checkpointing": "model.gradient_checkpointing_enable",
    "aux_loss_coef": "model.aux_loss_coef",
    "num_train_epochs": "train.max_epochs",
    "num_episodes": "train.max_epochs",
    "trainer.total_epochs": "train.max_epochs",
    "best_metric_key": "ckpt.best_metric_key",
    "max_length": "data.max_len",
}
"""The same for programs that learn from labelled rows."""

LOOP_RENAMED = {
    "best_of_n": "rollout.n_samples_per_prompt",
    "reward_template": "condition.template",
    "normalize_reward": "condition.normalize",
    "csft_prompt": "condition.template",
    "training_iters": "train.iterations",
}
"""The same for the loops over generations."""

OFFLINE_WITHOUT_COUNTERPART = {
    "data.multiturn": "a column of messages is a conversation, all of whose answers are learnt",
    "multiturn": "a column of messages is a conversation, all of whose answers are learnt",
    "model.margin_loss_enable": "margins are used where the data has a column of them; --data.margin-key names it",
    "model.compute_fp32_loss_enable": "losses are computed in fp32 always",
    "ref.offload": "the reference is asked before training begins, and is gone by then",
}

WITHOUT_COUNTERPART = {
    "algorithm.rollout_correction.bypass_mode": "the learner's log-probabilities are recomputed at every step",
    "rollout.vllm_generate_batch_size": "--rollout.over-sampling is that number of prompts divided by rollout.batch_size",
    "vllm_generate_batch_size": "--rollout.over-sampling is that number of prompts divided by rollout.batch_size",
    "rollout.micro_batch_size": REPLACED_BY_PACKING,
    "micro_rollout_batch_size": REPLACED_BY_PACKING,
    "train.dynamic_batch_enable": REPLACED_BY_PACKING,
    "use_dynamic_batch": REPLACED_BY_PACKING,
    "rollout.max_tokens_per_gpu": REPLACED_BY_PACKING,
    "ds.packing_samples": REPLACED_BY_PACKING,
    "packing_samples": REPLACED_BY_PACKING,
    "actor_rollout_ref.actor.ppo_mini_batch_size": "it counts prompts; train.batch_size counts samples: prompts times samples per prompt",
    "prompt_max_len": "give data.max_len, prompt and response together, and rollout.max_new_tokens, the response alone",
    "data.max_prompt_length": "give data.max_len, prompt and response together, and rollout.max_new_tokens, the response alone",
    "actor.freeze_visual_encoder": "name what is frozen: --actor.freeze 'model.visual.*'",
    "freeze_visual_encoder": "name what is frozen: --actor.freeze 'model.visual.*'",
    "data.max_images_per_prompt": "a prompt may have any number of images; data.max_len counts their tokens",
    "train.colocate_all": PLACEMENT,
    "train.colocate_actor_ref": PLACEMENT,
    "train.colocate_critic_reward": PLACEMENT,
    "colocate_all_models": PLACEMENT,
    "colocate_actor_ref": PLACEMENT,
    "colocate_critic_reward": PLACEMENT,
    "logger.logging_steps": RECORDED,
    "logger.wandb.project": RECORDED,
    "logger.wandb.run_name": RECORDED,
    "logging_steps": RECORDED,
    "use_tensorboard": RECORDED,
}

SECRETS = ("logger.wandb.key", "use_wandb", "wandb_key", "wandb.key", "hf_token", "token", "api_key")
"""Flags that carried a secret elsewhere: what is typed on a command line is seen by every process of the machine."""


def plain(name: str) -> str:
    """A name as typed, without its leading hyphens and with underscores."""
    return name.lstrip("-").replace("-", "_")


def flag(name: str) -> str:
    """A dotted name as it is typed."""
    return "--" + name.replace("_", "-")


def unknown(name: str, values: Sequence[str], known: Collection[str], elsewhere: Mapping[str, str]) -> tuple[str, str]:
    """What is wrong with an unknown name, given with these values, and how to mend it.

    `elsewhere` tells which other command a setting belongs to.
    """
    typed = plain(name)
    if typed in SECRETS:
        return f"{name} would put a secret on the command line, where every process of this machine can read it", f"drop it; {RECORDED}"
    for renamed in (RENAMED, OFFLINE_RENAMED, LOOP_RENAMED):
        if typed in renamed and _reaches(renamed[typed], known):
            return f"{name} has another name here", f"use {flag(renamed[typed])}"
    if mend := answer(typed, values):
        return f"{name} has another name here", mend
    without = WITHOUT_COUNTERPART | (OFFLINE_WITHOUT_COUNTERPART if "data.dataset" in known else {})
    if typed in without:
        return f"{name} has no counterpart here", f"drop it: {without[typed]}"
    target = RENAMED.get(typed, typed)
    for owned in ALIASES[target].targets if target in ALIASES else (target,):
        if owned in elsewhere:
            return f"{name} has no effect in this command", f"drop it: it belongs to `launch {elsewhere[owned]}`"
    return f"unknown option {name}", _suggest(typed, known)


def closest(name: str, names: Collection[str], *, at_most: int = 1) -> list[str]:
    """The most similar names, best first; none if none is near."""
    return difflib.get_close_matches(name, names, n=at_most, cutoff=0.6)


def _reaches(target: str, known: Collection[str]) -> bool:
    return all(one in known for one in (ALIASES[target].targets if target in ALIASES else (target,)))


def _suggest(typed: str, known: Collection[str]) -> str:
    group, _, last = typed.rpartition(".")
    same = [name for name in known if name.rpartition(".")[2] == last and name.startswith(group.partition(".")[0])]
    if not same:
        # Dots and underscores are one thing to a tired eye: `actor.learing_rate` is near the old `actor_learning_rate`.
        reachable = {old: new for old, new in (OFFLINE_RENAMED | RENAMED).items() if _reaches(new, known)}
        reachable |= {name: name for name in (*aliases(known), *known)}
        spelt = {name.replace(".", "_"): target for name, target in reachable.items()}
        same = list(dict.fromkeys(spelt[near] for near in closest(typed.replace(".", "_"), spelt, at_most=2)))[:1]
    if not same:
        return "`--help` lists every option; `--help WORD` those with a word in them"
    return "did you mean " + " or ".join(flag(name) for name in same[:3]) + "?"
