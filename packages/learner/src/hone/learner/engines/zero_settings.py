"""DeepSpeed's own configuration from ours, and what of ours it cannot do on this machine, said before a model is touched."""

import torch

from hone.learner.config import DeepSpeedConfig
from hone.learner.engines.loss_scale import INITIAL_POWER, WINDOW
from hone.learner.optim import Training

WHOLE_BELOW = 100_000
"""Parameters with fewer elements stay whole on every rank under stage 3: gathering them costs more than holding them."""


def stage_of(ds: DeepSpeedConfig) -> int:
    """The stage that DeepSpeed runs: `zero_stage`, but 1 for 0 in half precision."""
    # In bf16 DeepSpeed's stage 0 is an optimiser of its own: it sums gradients and rounds their norm in bf16, and its first update
    # is scaled as Adam's second; fp16 has another. Stage 1 is the same mathematics as the others and shards optimiser states alone.
    return ds.zero_stage if ds.param_dtype == "fp32" else max(ds.zero_stage, 1)


def check(ds: DeepSpeedConfig, *, device: torch.device, world_size: int, trained: int = 1) -> None:
    """Raises ValueError for what DeepSpeed cannot do, or not on `device`, with so many ranks or `trained` models in each."""
    if ds.adam_offload and stage_of(ds) == 0:
        raise ValueError("--ds.adam-offload needs sharded optimiser states; --ds.zero-stage 1, 2 or 3")
    if ds.cpu_adam == "deepspeed" and not ds.adam_offload:
        raise ValueError("--ds.cpu-adam deepspeed steps what is offloaded to the host; add --ds.adam-offload, or drop it")
    if ds.param_offload and ds.zero_stage != 3:
        raise ValueError(f"--ds.param-offload needs sharded parameters, which stage {ds.zero_stage} has not; --ds.zero-stage 3")
    if ds.zpg > 1 and (ds.zero_stage != 3 or world_size % ds.zpg):
        raise ValueError(
            f"--ds.zpg {ds.zpg} needs --ds.zero-stage 3 and a number of ranks it divides, not stage {ds.zero_stage} of {world_size}"
        )
    if ds.deepcompile:
        _check_compiled(ds, cuda=device.type == "cuda", trained=trained)
    if ds.grad_accum_dtype not in ("fp32", ds.param_dtype):
        raise ValueError(
            f"gradients of {ds.param_dtype} parameters cannot be summed in {ds.grad_accum_dtype}; "
            f"--ds.grad-accum-dtype fp32 or {ds.param_dtype}"
        )
    if ds.param_dtype == "fp16" and not has_fp16(device):
        raise ValueError("this processor has no fp16 arithmetic, and DeepSpeed asks for it; --ds.param-dtype fp32, or bf16")


def has_fp16(device: torch.device) -> bool:
    """Whether DeepSpeed takes the device for one with fp16 arithmetic: of processors few are."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _check_compiled(ds: DeepSpeedConfig, *, cuda: bool, trained: int) -> None:
    if ds.adam_offload or ds.param_offload:
        raise ValueError("--ds.deepcompile keeps gradients and parameters on the device, where its graph finds them; drop the offload")
    if ds.load_in_4bit or ds.lora.rank:
        raise ValueError("--ds.deepcompile is for whole models; drop it, or the adapters (--ds.lora.rank 0)")
    if ds.zero_stage == 3 and not cuda:
        raise ValueError("--ds.deepcompile knows stage 3's gathers on CUDA only; here --ds.zero-stage 0, 1 or 2")
    if cuda and trained > 1 and stage_of(ds) > 0:
        raise ValueError(
            f"DeepCompile holds one model a process, and {trained} train in each here; give the critic a group of its own "
            "(--placement.critic critic), or drop --ds.deepcompile"
        )


def settings(ds: DeepSpeedConfig, training: Training | None, *, whole_below: int, device: torch.device) -> dict[str, object]:
    """What `deepspeed.initialize` takes; without `training`, of a frozen model."""
    zero: dict[str, object] = {
        "stage": stage_of(ds),
        "stage3_param_persistence_threshold": whole_below,
        "overlap_comm": ds.overlap_comm,
        "zero_hpz_partition_size": ds.zpg,
    }
    if ds.adam_offload and training is not None:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if ds.param_offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    chosen: dict[str, object] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": ds.param_dtype == "bf16"},
        # AdamW as torch has it; "untested" means that DeepSpeed's own list does not name it.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if ds.param_dtype == "fp16":
        scale = {"initial_scale_power": INITIAL_POWER, "loss_scale_window": WINDOW, "hysteresis": 1, "min_loss_scale": 1}
        chosen["fp16"] = {"enabled": True, "loss_scale": 0, **scale}
    if ds.deepcompile and training is not None and device.type == "cuda" and stage_of(ds) > 0:
        # Elsewhere its passes cannot run: their native part is CUDA's, and stage 0 has no transfers within a graph.
        chosen["compile"] = {"deepcompile": True}
    if training is not None:
        chosen["gradient_clipping"] = training.config.max_norm
    if ds.param_dtype != "fp32":
        chosen["data_types"] = {"grad_accum_dtype": ds.grad_accum_dtype}
    return chosen
