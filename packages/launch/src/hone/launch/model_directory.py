"""What is wrong with a model directory, told from its files; nothing is loaded, and no code in it is run."""

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from hone.launch.errors import ENVIRONMENT, Problem, exit_code
from hone.launch.names import closest
from hone.launch.schema import shown
from hone.launch.toml import nearest
from hone.learner.errors import ModelError
from hone.learner.model_files import check_model

TOKENIZERS = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"}


def faults(name: str, *, max_len: int) -> Iterator[Problem]:
    """Faults of a model directory for samples of `max_len` tokens; a hub id (`org/name`) is left to the loader."""
    path = Path(name).expanduser()
    if _slip(name):
        yield Problem(what=f"there is no model directory {shown(name)}", mend=f"{nearest(name)}; a hub id is written org/name")
        return
    try:
        check_model(name)
    except ModelError as error:
        yield Problem(what=str(error), mend="", code=exit_code(error))
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
    if not files & TOKENIZERS:
        yield Problem(what=f"{name} has no tokenizer", mend="save the tokenizer beside the model", code=ENVIRONMENT)
    yield from _remote_code(name, described, tokenizer)
    longest = described.get("max_position_embeddings")
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
