"""What a model name stands for on disk; `check_model` needs the standard library only, so it can run before anything is loaded.

A name is a directory if one exists under it or if it is written like a path; otherwise it is a hub id ("organisation/name"),
of which only `resolve` can tell whether it exists.
"""

import difflib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from hone.learner.errors import ModelError

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
PREFIX = "value_head_prefix"
"""Under this name a configuration keeps its head's, where that is not transformers' own "score"; OpenRLHF's, too."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check_model(name: str) -> None:
    """Raises ModelError for a directory that is not there, or that holds no model that can be read safely."""
    directory = Path(name).expanduser()
    if not directory.is_dir():
        _check_missing(name, directory)
        return
    config = directory / "config.json"
    if not config.is_file():
        found = ", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "nothing"
        raise ModelError(f"{name} has no config.json (found: {found}); name a Hugging Face model directory")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config} is not valid JSON ({error}); copy it again from where the model came from") from error
    if not any(directory.glob("*.safetensors")):
        pickled = sorted(entry.name for pattern in PICKLED for entry in directory.glob(pattern))
        if not pickled:
            raise ModelError(f"{name} has a config.json but no *.safetensors; the weights are missing, copy them there")
        raise ModelError(_convert_remedy(name, settings, pickled))


def check_tensor_parallel(directory: str, *, size: int) -> None:
    """Raises ValueError for a model whose attention heads, or key heads, do not fall into `size` equal parts."""
    settings = _text_settings(directory)
    for entry, what in (("num_attention_heads", "attention heads"), ("num_key_value_heads", "key heads")):
        heads = settings.get(entry)
        if isinstance(heads, int) and heads % size:
            sizes = [one for one in range(1, heads + 1) if heads % one == 0]
            raise ValueError(f"--ds.tensor-parallel-size {size} does not divide the {heads} {what} of {directory}; choose of {sizes}")


def check_ring(directory: str, *, world_size: int, size: int, head_stride: int | None, tensor_parallel_size: int = 1) -> None:
    """Raises ValueError for rings of `size` that do not come out even, and for key heads that `head_stride` does not divide."""
    if world_size % size:
        raise ValueError(
            f"{world_size} ranks do not fall into rings of {size}; --ds.ring-attn-size must divide the ranks of every group that learns"
        )
    if size == 1 or head_stride is None:
        return
    settings = _text_settings(directory)
    heads = settings.get("num_key_value_heads") or settings.get("num_attention_heads")
    if isinstance(heads, int) and heads // tensor_parallel_size % head_stride:
        here = heads // tensor_parallel_size
        of_rank = f"{heads} key heads" if tensor_parallel_size == 1 else f"{here} key heads that a rank has of the {heads}"
        raise ValueError(
            f"--ds.ring-attn-head-stride {head_stride} does not divide the {of_rank} of {directory}; choose a divisor of {here}"
        )


def head_name(directory: Path, prefix: str) -> str:
    """What the head is called in `directory`: as its configuration says, else `prefix`."""
    stored = json.loads((directory / "config.json").read_text(encoding="utf-8")).get(PREFIX)
    return stored if isinstance(stored, str) else prefix


def model_type(directory: Path) -> str:
    """The architecture of the model in `directory`, by transformers' name ("llama"), as its configuration says."""
    return str(json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type"))


def _text_settings(directory: str) -> dict[str, object]:
    settings = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    return settings.get("text_config", settings)


def resolve(name: str) -> Path:
    """The directory that holds the model, downloaded from the hub where `name` is a hub id. Raises ModelError."""
    check_model(name)
    directory = Path(name).expanduser()
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            directory = Path(snapshot_download(name, allow_patterns=WANTED))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(
                f"no model {name}: not a directory here (working directory {Path.cwd()}){_near(directory)}, and the hub gave "
                f"{type(error).__name__}. Check the spelling; log in (hf auth login) if the model is gated; without a network, "
                "download it where there is one and name the directory"
            ) from error
        check_model(str(directory))
    return directory


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what a tokenizer, its template, an image processor and generation defaults are made of, byte for byte."""
    names = ["merges.txt", "vocab.txt", "vocab.json", "added_tokens.json", "special_tokens_map.json", "generation_config.json"]
    names += ["processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"]
    wanted = {*names, *(entry.name for pattern in ("*.model", "*.jinja", "tokenizer*") for entry in source.glob(pattern))}
    for name in sorted(wanted):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_missing(name: str, directory: Path) -> None:
    if directory.is_file():
        raise ModelError(f"{name} is a file; name the directory that holds config.json and the *.safetensors")
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"no model directory {name} (working directory {Path.cwd()}){_near(directory)}")


def _near(path: Path) -> str:
    """'; did you mean X?' with the most similar directories beside `path`, or an empty string."""
    if not path.parent.is_dir():
        existing = next(one for one in [*path.parent.parents, Path("/")] if one.is_dir())
        return f"; {path.parent} does not exist either, the last directory on the way that does is {existing}"
    matches = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir() if entry.is_dir()], n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(str(path.parent / match) for match in matches)}?" if matches else ""


def _convert_remedy(name: str, settings: dict[str, object], pickled: Sequence[str]) -> str:
    architectures = settings.get("architectures")
    model_class = architectures[0] if isinstance(architectures, list) and architectures else "AutoModelForCausalLM"
    return (
        f"{name} holds its weights as pickle ({', '.join(pickled[:3])}), which can run code when it is read; only safetensors are "
        "accepted. If you trust where it came from, convert it once: "
        f"python -c \"from transformers import {model_class} as M; M.from_pretrained('{name}').save_pretrained('{name}-safetensors')\" "
        f"and copy the tokenizer files into {name}-safetensors"
    )
