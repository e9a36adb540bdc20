"""Settings of the learner: models, optimisers, sharding."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hone.algos.ranges import Range

Schedule = Literal["constant", "linear", "cosine_with_min_lr"]


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """AdamW."""

    lr: Annotated[float, Range(low=0, high=1, open_high=True)] = 1e-6
    """Peak learning rate."""
    betas: tuple[Annotated[float, Range(low=0, high=1, open_high=True)], Annotated[float, Range(low=0, high=1, open_high=True)]] = (
        0.9,
        0.95,
    )
    """Decay of the first and of the second moment, each in [0, 1)."""
    eps: Annotated[float, Range(low=0, open_low=True)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Range(low=0)] = 0.0
    """Decoupled weight decay; biases and norms are exempt."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon, for the matrices of numbered layers, each expert's by itself; everything else is AdamW's, with its own settings."""

    lr: Annotated[float, Range(low=0, high=1, open_high=True)] = 0.02
    """Peak learning rate, in units of the spectral norm."""
    momentum: Annotated[float, Range(low=0, high=1, open_high=True)] = 0.95
    """Decay of the average of gradients."""
    nesterov: bool = True
    """Look ahead: mix the gradient into the average once more."""
    ns_steps: Annotated[int, Range(low=1, high=99)] = 5
    """Newton-Schulz iterations that orthogonalise the update."""
    weight_decay: Annotated[float, Range(low=0)] = 0.0
    """Decoupled weight decay."""


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """The policy."""

    model_name_or_path: str | None = None
    """A Hugging Face model directory or hub id; without one, the small model that ships as a recipe with this project."""
    num_nodes: Annotated[int, Range(low=1)] = 1
    """Machines the role's group spans."""
    num_gpus_per_node: Annotated[int, Range(low=1)] = 1
    """Learner ranks on each machine: GPUs, or worker processes where there is no GPU."""
    adam: AdamConfig = field(default_factory=AdamConfig)
    """Optimiser."""
    optim: Literal["adam", "muon"] = "adam"
    """adam: AdamW for all; muon: Muon for hidden matrices, AdamW for the rest."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Muon, where `optim` chooses it."""
    lr_scheduler: Schedule = "cosine_with_min_lr"
    """Shape of the learning rate over the run's optimiser steps, after warm-up."""
    lr_warmup_ratio: Annotated[float, Range(low=0, high=1)] = 0.03
    """Share of the optimiser steps spent on linear warm-up."""
    min_lr_ratio: Annotated[float, Range(low=0, high=1)] = 0.1
    """Lowest learning rate, as a share of the peak."""
    max_norm: Annotated[float, Range(low=0, open_low=True)] = 1.0
    """Gradient norm above which gradients are scaled down."""
    max_skipped_steps: Annotated[int, Range(low=0)] = 3
    """Optimiser steps in a row that are left out because a loss or the gradient norm is not finite; one more ends the run."""
    gradient_checkpointing_enable: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    freeze: str | None = None
    """Parameters that stay as they were loaded: patterns of their names with commas between, * for any text ("*.mlp.gate.*")."""
    aux_loss_coef: Annotated[float, Range(low=0)] = 0.0
    """Weight of the load-balancing loss of a mixture of experts, over all tokens of an optimiser step; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The critic: the policy's architecture with a value head."""

    model_name_or_path: str | None = None
    """A Hugging Face model directory or hub id; without one, the policy's."""
    num_nodes: Annotated[int, Range(low=1)] = 1
    """Machines the role's group spans."""
    num_gpus_per_node: Annotated[int, Range(low=1)] = 1
    """Learner ranks on each machine, where the critic has a group of its own."""
    adam: AdamConfig = field(default_factory=lambda: AdamConfig(lr=9e-6))
    """Optimiser."""
    optim: Literal["adam", "muon"] = "adam"
    """adam: AdamW for all; muon: Muon for hidden matrices, AdamW for the rest."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Muon, where `optim` chooses it."""
    lr_scheduler: Schedule = "cosine_with_min_lr"
    """Shape of the learning rate over the run's optimiser steps, after warm-up."""
    lr_warmup_ratio: Annotated[float, Range(low=0, high=1)] = 0.03
    """Share of the optimiser steps spent on linear warm-up."""
    min_lr_ratio: Annotated[float, Range(low=0, high=1)] = 0.1
    """Lowest learning rate, as a share of the peak."""
    max_norm: Annotated[float, Range(low=0, open_low=True)] = 1.0
    """Gradient norm above which gradients are scaled down."""
    max_skipped_steps: Annotated[int, Range(low=0)] = 3
    """Optimiser steps in a row that are left out because a loss or the gradient norm is not finite; one more ends the run."""
    gradient_checkpointing_enable: bool = False
    """Recompute activations in the backward pass."""
    freeze: str | None = None
    """Parameters that stay as they were loaded: patterns of their names with commas between, * for any text ("*.mlp.gate.*")."""
    aux_loss_coef: Annotated[float, Range(low=0)] = 0.0
    """Weight of the load-balancing loss of a mixture of experts, over all tokens of an optimiser step; 0 for none."""
    freezing_steps: Annotated[int, Range(low=0)] = 0
    """Steps at the start during which only the critic learns."""


@dataclass(frozen=True, kw_only=True)
class RefConfig:
    """The frozen reference model of the KL penalty."""

    model_name_or_path: str | None = None
    """A Hugging Face model directory or hub id; without one, the policy as it was at the start."""
    num_nodes: Annotated[int, Range(low=1)] = 1
    """Machines the role's group spans."""
    num_gpus_per_node: Annotated[int, Range(low=1)] = 1
    """Learner ranks on each machine, where the reference has a group of its own."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters in place of training the weights themselves."""

    rank: Annotated[int, Range(low=0)] = 0
    """Rank of the matrices A and B beside each weight; 0 trains the weights themselves, without adapters."""
    alpha: Annotated[int, Range(low=1)] = 16
    """The adapter adds alpha / rank times B A to a weight."""
    dropout: Annotated[float, Range(low=0, high=1, open_high=True)] = 0.0
    """Share of an adapter's inputs dropped while it trains; log-probabilities of the sampled tokens are taken without."""
    target_modules: str = "all-linear"
    """Linear layers that get an adapter: the ends of their names with commas between, "q_proj,v_proj"; all-linear for all but the head."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """How models are held and sharded."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards over the ranks: 0 nothing (in bf16 as 1), 1 optimiser states, 2 and gradients, 3 and parameters."""
    param_dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of the parameters in forward and backward, fp16 with a loss scale; masters and optimiser states are fp32 always."""
    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format in which gradients of micro-batches are summed: fp32, or that of the parameters."""
    adam_offload: bool = False
    """Hold masters and optimiser states in the host's memory and step them there; ZeRO stages 1 to 3."""
    cpu_adam: Literal["torch", "deepspeed"] = "torch"
    """Whose AdamW steps what is offloaded: torch's fused one, or DeepSpeed's, built by a C++ compiler at its first use (minutes)."""
    param_offload: bool = False
    """Hold the parameters' shards in the host's memory, and bring them to the device layer by layer; ZeRO stage 3."""
    zpg: Annotated[int, Range(low=1)] = 1
    """ZeRO++ hpZ: stage 3 keeps a second copy of its shards within so many neighbouring ranks, and gathers from them; 1 is off."""
    overlap_comm: bool = False
    """Reduce gradients while backward goes on; more buffers, the same numbers."""
    deepcompile: bool = False
    """Compile the transformers that train: on CUDA from ZeRO 1 on with the ranks' transfers in the graph, else by torch alone."""
    enable_sleep: bool = False
    """Keep on the device only the role that computes: between phases parameters, gradients and optimiser states go to the host."""
    tensor_parallel_size: Annotated[int, Range(low=1)] = 1
    """Consecutive ranks that hold one model together and share every micro-batch: heads, MLP columns and vocabulary are cut among them."""
    ring_attn_size: Annotated[int, Range(low=1)] = 1
    """Consecutive ranks that share every micro-batch, long rows cut among them; it may hold this many times the tokens of one rank."""
    ring_attn_head_stride: Annotated[int, Range(low=1)] | None = None
    """Key heads for which a ring gathers all keys at a time; without it, keys go round, one rank's at a time (ring-flash-attn: all)."""
    ring_attn_impl: Literal["own", "ring-flash-attn"] = "own"
    """Whose attention a ring computes with: ours, or the package's, which gathers keys; it needs CUDA, flash-attn, bf16 or fp16."""
    value_head_prefix: str = "score"
    """Name of the value, reward or process head in its checkpoint, unless the checkpoint says it itself."""
    normalize_reward: bool = False
    """Scores and values of a reward model, and of a critic that began as one, less the mean and over the deviation in its configuration."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters of every model that trains."""
    load_in_4bit: bool = False
    """Hold the weights of linear layers in 4 bits (nf4 of bitsandbytes), frozen below adapters; for frozen models, too."""
    use_liger_kernel: bool = False
    """Liger's Triton kernels for norms, rotary embeddings and gated MLPs; on CUDA, where the package is installed."""

    @property
    def ranks_per_shard(self) -> int:
        """Consecutive ranks that work on the same micro-batches: a ring, of ranks or of groups that hold one model."""
        return self.ring_attn_size * self.tensor_parallel_size
