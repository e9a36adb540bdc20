"""A trained model as others read it: Hugging Face format with its tokenizer, and its adapter alone beside it."""

from contextlib import nullcontext
from pathlib import Path

from hone.learner.adapters import adapter_of, save_adapter
from hone.learner.engines.protocol import Engine
from hone.learner.model_files import copy_tokenizer, model_type


def write(engine: Engine, directory: Path, *, source: Path, rank: int, average: bool) -> None:
    """Rank 0 writes, all ranks gather; `source` is the model it was made from. Raises ValueError for an average that is not kept."""
    with engine.averaged() if average else nullcontext():
        weights = {name: tensor.cpu().clone() for name, tensor in engine.weights() if rank == 0}
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        engine.module.save(directory, weights)
        copy_tokenizer(source, directory)
    if engine.module.adapted.config is not None:
        tensors = {name: tensor.cpu().clone() for name, tensor in engine.weights(adapter_of(engine.module)) if rank == 0}
        if rank == 0:
            save_adapter(directory / "adapter", engine.module.adapted, tensors, base=str(source), model_type=model_type(source))
