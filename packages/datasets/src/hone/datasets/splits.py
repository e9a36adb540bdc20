"""Which files hold a split: `train[:10%]` into a name and a range; names of files, or a card's `configs`, into splits."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from hone.datasets.errors import DataError, did_you_mean
from hone.datasets.errors import shown as quoted
from hone.datasets.sources import SUFFIXES

# Words that name a split within a file's name; https://huggingface.co/docs/hub/datasets-file-names-and-splits
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_BOUND = r"(-?\d+(?:\.\d+)?%|-?\d+)?"
_SPLIT = re.compile(rf"([\w.-]+)(?:\[{_BOUND}:{_BOUND}\])?")
_SHARD = re.compile(r"(?:.*/)?([\w.]+?)-\d{5}-of-\d{5}\.\w+")


@dataclass(frozen=True, kw_only=True)
class Split:
    """A named part of a dataset, and the rows [start, stop) of it: a number, a share of all ("10%"), or the end (None).

    `flag` is where it was asked for.
    """

    text: str
    name: str
    flag: str
    start: str | None = None
    stop: str | None = None

    def bounds(self, count: int) -> tuple[int, int]:
        """The rows meant, of `count`."""
        start, stop = (_place(bound, count, default) for bound, default in ((self.start, 0), (self.stop, count)))
        return start, max(start, stop)

    @property
    def first_rows(self) -> int | None:
        """How many rows from the start are enough to know the part; None where all must be counted."""
        whole = self.stop is None or self.stop.endswith("%") or self.stop.startswith("-") or (self.start or "").endswith("%")
        return None if whole or (self.start or "").startswith("-") else int(self.stop or 0)


def read_split(text: str, *, flag: str) -> Split:
    """The meaning of `train`, `train[:1000]`, `train[10%:20%]`, `test[-500:]`. Raises DataError."""
    match = _SPLIT.fullmatch(text.strip())
    if match is None:
        raise DataError(f"{flag} {text!r} is no split; write a name, or a part of one such as train[:1000], train[10%:20%], train[-500:]")
    for bound in match.groups()[1:]:
        if bound is not None and bound.endswith("%") and not 0 <= abs(float(bound[:-1])) <= 100:
            raise DataError(f"{flag} {text!r} asks for {bound}; a share lies between 0% and 100%")
    start, stop = match[2], match[3]
    if start and stop and not start.startswith("-") and not stop.startswith("-") and start.endswith("%") == stop.endswith("%"):
        ends = [float(bound.rstrip("%")) for bound in (start, stop)]
        if ends[0] >= ends[1]:
            raise DataError(f"{flag} {text!r} is empty: it ends where it begins, or before; write the lower bound first")
    return Split(text=text, name=match[1], flag=flag, start=start, stop=stop)


def split_files(names: Sequence[str], card: Mapping[str, object], *, config: str | None, shown: str) -> dict[str, list[str]]:
    """The files of every split: by the card's `configs` where it has any, else by the names of the files; one called "train" without.

    Raises DataError where nothing is a data file, and where several configurations are there and none is asked for.
    """
    data = sorted(name for name in names if name.endswith(SUFFIXES) and not name.rpartition("/")[2].startswith((".", "dataset_info")))
    configs = card.get("configs")
    if isinstance(configs, list) and configs:
        return _from_card(configs, data, config=config, shown=shown)
    if config is not None:
        raise DataError(f"{shown} has no configurations, and {config!r} was asked for; drop `:{config}`")
    if not data:
        raise DataError(f"{shown} has no data files ({', '.join(SUFFIXES)}) among its {len(names)} files; name another dataset")
    found: dict[str, list[str]] = {}
    for name in data:
        found.setdefault(_split_of(name), []).append(name)
    return {split or "train": files for split, files in found.items()} if set(found) == {""} else {k: v for k, v in found.items() if k}


def unknown_split(asked: str, names: Sequence[str], *, shown: str, flag: str) -> DataError:
    """What to say where a dataset has other splits than the one asked for."""
    there = ", ".join(map(repr, names))
    return DataError(f"{flag} {asked!r}: {shown} has no such split, but {there}; name one{did_you_mean(asked, names)}")


def card_of(file: Path, *, shown: str) -> Mapping[str, object]:
    """What stands at the head of a dataset's README.md, between lines of three dashes. Raises DataError for what is no YAML."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(file) or {}
    except (yaml.YAMLError, ValueError) as error:
        where = " ".join(str(error).split())
        raise DataError(f"{shown}: its card (README.md) is no YAML at its head: {where}; mend those lines, or take them out") from error


def _from_card(configs: list[object], data: Sequence[str], *, config: str | None, shown: str) -> dict[str, list[str]]:
    named = {str(entry.get("config_name", "default")): entry for entry in configs if isinstance(entry, Mapping)}
    chosen = config
    if chosen is None:
        marked = [name for name, entry in named.items() if entry.get("default") is True]
        chosen = (marked or (["default"] if "default" in named else list(named) if len(named) == 1 else [""]))[0]
    if chosen not in named:
        asked = "none was asked for" if config is None else f"not {config!r}{did_you_mean(config, named)}"
        raise DataError(f"{shown} has the configurations {', '.join(map(repr, named))}, {asked}; name one: OWNER/NAME:CONFIGURATION")
    files = named[chosen].get("data_files", named[chosen].get("data_dir"))
    entries = files if isinstance(files, list) and files and isinstance(files[0], Mapping) else [{"split": "train", "path": files or "*"}]
    if wrong := [entry for entry in entries if not (isinstance(entry, Mapping) and {"split", "path"} <= entry.keys())]:
        raise DataError(f"{shown}: its card (README.md) has {quoted(wrong[0])} among its data files; write a split and a path for each")
    found: dict[str, list[str]] = {}
    for entry in entries:
        patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        found[str(entry["split"])] = [name for name in data if any(_matches(name, str(pattern)) for pattern in patterns)]
    if empty := [split for split, inside in found.items() if not inside]:
        raise DataError(f"{shown}: its card names files for the split {empty[0]!r} that are not there, or are no data files; ask its owner")
    return found


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./")
    return fnmatch(name, pattern) or fnmatch(name, f"{pattern.rstrip('/')}/*") or fnmatch(name, pattern.replace("**/", ""))


def _split_of(name: str) -> str:
    """The split a file's name tells: "train-00000-of-00002.parquet", "data/test.jsonl", "validation/0.json"; empty without one."""
    if match := _SHARD.fullmatch(name):
        return _word(match[1]) or match[1]
    folder, _, file = name.rpartition("/")
    stem = file.partition(".")[0]
    return _word(stem) or next((word for part in reversed(folder.split("/")) if (word := _word(part))), "")


def _word(text: str) -> str:
    words = re.split(r"[^a-z]+", text.lower())
    return next((split for split, names in WORDS.items() if any(word in names for word in words)), "")


def _place(bound: str | None, count: int, default: int) -> int:
    if bound is None:
        return default
    place = round(float(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
    return min(count, max(0, place + count if place < 0 else place))
