"""Adapters into the weights they were trained beside: one model directory out of two; policies, reward and process models alike."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hone.learner.adapters import MODEL_TYPE
from hone.learner.errors import ModelError
from hone.learner.model_files import copy_tokenizer, model_type, resolve

TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
HEAD = ".score.weight"


def merge(model: str, adapter: Path, out: Path, *, dtype: torch.dtype | None = None) -> str:
    """Writes `model` with the adapter merged in to `out`, with its tokenizer; returns the adapter's task.

    The adapter says which kind of model it is of; one of a reward or process model brings its head. `dtype` None keeps the model's
    own number format. Raises ModelError for a directory that holds no adapter, one of another task, or one of another model, by its
    architecture or by its shapes.
    """
    import peft
    import transformers

    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ModelError(f"{adapter} holds no adapter (there is no adapter_config.json); name a directory that PEFT, or a run here, wrote")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        task = str(config.get("task_type"))
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{file} is no configuration of an adapter ({error}); copy it again from where the adapter came from") from error
    if task not in TASKS:
        raise ModelError(f"{adapter} is an adapter for {task}; {', '.join(TASKS)} can be merged")
    source = resolve(model)
    labels = _labels(adapter)
    trained_on = (config.get("auto_mapping") or {}).get(MODEL_TYPE) or _base_type(config)
    if trained_on is not None and trained_on != model_type(source):
        raise ModelError(
            f"{adapter} was trained on a model of the architecture {trained_on} ({config.get('base_model_name_or_path')}), and {model} is "
            f"{model_type(source)}; name the model it was trained on"
        )
    head = {} if task == "CAUSAL_LM" else {"num_labels": labels or 1}
    base = getattr(transformers, TASKS[task]).from_pretrained(source, dtype=dtype or "auto", **head)
    try:
        adapted = peft.PeftModel.from_pretrained(base, str(adapter))
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{adapter} does not fit {model}: {str(error).strip().splitlines()[0]}; name the model it was trained on"
        ) from error
    merged = adapted.merge_and_unload()  # pyright: ignore[reportCallIssue] - PEFT types it as a tensor
    merged.save_pretrained(out)
    copy_tokenizer(source, out)
    return task


def _labels(adapter: Path) -> int | None:
    """How many labels the head in an adapter's file has; none where it has no head."""
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"{adapter} has no adapter_model.safetensors; copy the adapter's weights there, saved as safetensors")
    try:
        with safe_open(file, framework="pt") as opened:
            heads = [name for name in opened.keys() if name.endswith(HEAD)]  # noqa: SIM118 - it is no dict
            return opened.get_slice(heads[0]).get_shape()[0] if heads else None
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged ({error}); copy it again from where the adapter came from") from error


def _base_type(config: dict[str, Any]) -> str | None:
    """The architecture of the model that an adapter of others names as its own, where that is a directory here."""
    named = config.get("base_model_name_or_path")
    here = isinstance(named, str) and (Path(named).expanduser() / "config.json").is_file()
    return model_type(Path(str(named)).expanduser()) if here else None
