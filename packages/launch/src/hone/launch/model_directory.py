"""What is wrong with a model directory, told from its files; nothing is loaded, and no code in it is run."""

import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from hone.datasets.tokenizer import SEEING, VOCABULARY_FILES
from hone.launch.errors import ENVIRONMENT, Problem, exit_code
from hone.launch.names import closest
from hone.launch.schema import shown
from hone.launch.toml import nearest
from hone.learner.errors import ModelError
from hone.learner.model_files import check_model, head_name

IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
LONGEST_HEADER = 100_000_000
"""Bytes a safetensors header may have; the format's own limit."""


def stated(error: Exception, *, otherwise: str) -> Problem:
    """Another package's error as a problem: its text is what is wrong and, behind the first semicolon, how to mend it."""
    what, _, mend = str(error).partition("; ")
    return Problem(what=what, mend=mend or otherwise, code=exit_code(error))


def faults(name: str, *, max_len: int) -> Iterator[Problem]:
    """Faults of a model directory for samples of `max_len` tokens; a hub id (`org/name`) is left to the loader."""
    path = Path(name).expanduser()
    if _slip(name):
        yield Problem(what=f"there is no model directory {shown(name)}", mend=f"{nearest(name)}; a hub id is written org/name")
        return
    try:
        check_model(name)
    except ModelError as error:
        yield stated(error, otherwise="name the directory that holds config.json and the *.safetensors; a hub id is written org/name")
        return
    if not path.is_dir():
        return
    try:
        described = _json_object(path / "config.json")
        tokenizer = _json_object(path / "tokenizer_config.json")
        shards = _shards(path)
    except (OSError, ValueError) as error:
        yield Problem(what=str(error), mend="save the model again", code=ENVIRONMENT)
        return
    files = {entry.name for entry in path.iterdir()}
    if gone := sorted(shards - files):
        what = f"{name} lacks {len(gone)} of its {len(shards)} weight files: {', '.join(gone[:3])}"
        yield Problem(what=what, mend="copy or download the model again", code=ENVIRONMENT)
    for file in sorted(path.glob("*.safetensors")):
        if fault := _weight_fault(file):
            yield Problem(what=f"{file} {fault}", mend="copy or download the model again", code=ENVIRONMENT)
    if not any(next(path.glob(pattern), None) for pattern in VOCABULARY_FILES):
        mend = f"save the tokenizer beside the model: one of {', '.join(VOCABULARY_FILES)} and what belongs to it"
        yield Problem(what=f"{name} has no tokenizer", mend=mend, code=ENVIRONMENT)
    yield from _remote_code(name, described, tokenizer)
    if described.get("model_type") in SEEING and not files.intersection(IMAGE_PROCESSORS):
        mend = f"copy {' or '.join(IMAGE_PROCESSORS)} of the model into it"
        yield Problem(what=f"{name} is a vision-language model without an image processor", mend=mend, code=ENVIRONMENT)
    inner = described.get("text_config")
    longest = (inner if isinstance(inner, dict) else described).get("max_position_embeddings")
    if isinstance(longest, int) and max_len > longest:
        what = f"data.max_len {max_len} is more than the model's {longest} positions (max_position_embeddings in its config.json)"
        yield Problem(what=what, mend=f"--data.max-len {longest} or less, or a model with a longer context")


def _slip(name: str) -> bool:
    """Whether a name that could be a hub id is a path mistyped: its first part is a directory here, or nearly one."""
    if Path(name).expanduser().exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return False
    first, slash, _ = name.partition("/")
    directories = [entry.name for entry in Path.cwd().iterdir() if entry.is_dir()]
    return first in directories if slash else bool(closest(name, directories))


def _remote_code(name: str, described: Mapping[str, object], tokenizer: Mapping[str, object]) -> Iterator[Problem]:
    """A model or tokenizer that names code of its own is refused, unless transformers has the architecture itself."""
    library = importlib.util.find_spec("transformers")
    kind = str(described.get("model_type", "")).replace("-", "_")
    homes = [Path(place) / "models" / kind for place in library.submodule_search_locations or ()] if library else []
    native = bool(kind) and any(home.is_dir() for home in homes)
    for file, content in (("config.json", described), ("tokenizer_config.json", tokenizer)):
        if "auto_map" in content and not native:
            what = f"{name} needs code of its own (auto_map in {file}), and code from a model directory is never run"
            yield Problem(what=what, mend="use a model whose architecture transformers has itself", code=ENVIRONMENT)


def _shards(path: Path) -> set[str]:
    """Weight files that a sharded model's index names."""
    index = path / "model.safetensors.index.json"
    weights = _json_object(index).get("weight_map", {})
    if not isinstance(weights, dict):
        raise ValueError(f"{index} has no weight_map")
    return {str(file) for file in weights.values()}


def _weight_fault(file: Path) -> str:
    """What is wrong with a safetensors file: 8 bytes give the length of a JSON header, which gives that of the whole file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if size < 8 or (length <= LONGEST_HEADER and size < 8 + length):
                return f"is cut off within its header: it has {size} bytes"
            if length > LONGEST_HEADER:
                return "is no safetensors file: it does not begin with the length of a header"
            header = json.loads(content.read(length))
        whole = 8 + length + max((int(one["data_offsets"][1]) for name, one in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        return f"cannot be read: {os.strerror(error.errno or 0)}"
    except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError):
        return "is no safetensors file: its header does not list tensors"
    if size < whole:
        return f"is cut off: it has {size} of the {whole} bytes that its header speaks of"
    return f"has {size} bytes, more than the {whole} that its header speaks of" if size > whole else ""


def numbers_in(file: Path) -> int:
    """Numbers that a safetensors file holds, by its header; 0 for one that cannot be read, which `faults` tells of."""
    return sum(math.prod(shape) for shape in _shapes_in(file).values())


def holds_head(path: Path, prefix: str) -> bool:
    """Whether a model directory has a value, reward or process head, called `prefix` unless its configuration names it."""
    name = f"{head_name(path, prefix)}.weight"
    return any(name in _shapes_in(file) for file in path.glob("*.safetensors"))


def _shapes_in(file: Path) -> dict[str, list[int]]:
    """Shape of each tensor, by the header; none of a file that cannot be read."""
    try:
        with file.open("rb") as content:
            header = json.loads(content.read(min(int.from_bytes(content.read(8), "little"), LONGEST_HEADER)))
        return {name: [int(size) for size in one["shape"]] for name, one in header.items() if name != "__metadata__"}
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return {}


def _json_object(path: Path) -> dict[str, object]:
    """The content of a JSON file; nothing where there is none."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def sees(name: str) -> bool:
    """Whether a model directory is of a vision-language model that images are shown to; a hub id is not looked at."""
    path = Path(name).expanduser() / "config.json"
    try:
        return path.is_file() and _json_object(path).get("model_type") in SEEING
    except (OSError, ValueError):
        return False  # `faults` tells of it
