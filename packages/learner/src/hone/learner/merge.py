"""Adapters into the weights they were trained beside: one model directory out of two, policies and reward models alike."""

import json
from pathlib import Path

import torch

from hone.learner.errors import ModelError
from hone.learner.model_files import copy_tokenizer, resolve

TASKS = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}


def merge(model: str, adapter: Path, out: Path, *, dtype: torch.dtype | None = None) -> str:
    """Writes `model` with the adapter merged in to `out`, with its tokenizer; returns the adapter's task.

    The adapter says which kind of model it is of; one of a reward model brings its head. `dtype` None keeps the model's own number
    format. Raises ModelError for a directory that holds no adapter, one of another task, or one of another model.
    """
    import peft
    import transformers

    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ModelError(f"{adapter} holds no adapter (there is no adapter_config.json); name a directory that PEFT, or a run here, wrote")
    task = str(json.loads(file.read_text(encoding="utf-8")).get("task_type"))
    if task not in TASKS:
        raise ModelError(f"{adapter} is an adapter for {task}; {' and '.join(TASKS)} can be merged")
    source = resolve(model)
    labels = {"num_labels": 1} if task == "SEQ_CLS" else {}
    base = getattr(transformers, TASKS[task]).from_pretrained(source, dtype=dtype or "auto", **labels)
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
