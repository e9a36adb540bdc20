"""What `--data.prompt-dataset` and its like name: one dataset or several, each opened as the sources that hold the rows asked for.

A dataset is a file, a saved Hugging Face dataset, a folder of data files, or a name of the hub. A file alone has one split, "train".
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hone.datasets.arrow_rows import read_saved, saved_splits
from hone.datasets.errors import DataError, bad_rows_error
from hone.datasets.hub import HubName, download, hub_name
from hone.datasets.lazy import Joined, Span
from hone.datasets.records import Source
from hone.datasets.sources import FLAG, SUFFIXES, read_file
from hone.datasets.splits import Split, card_of, read_split, split_files, unknown_split
from hone.datasets.tasks import reasoning

ALL = 10**15
SPLIT_FLAG = "--data.prompt-split"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One named dataset: the sources (files) that hold its rows, in order."""

    name: str
    sources: tuple[Source, ...]

    @property
    def folder(self) -> Path:
        """Where relative paths in its rows begin."""
        path = Path(self.name).expanduser()
        return path if path.is_dir() else path.parent


def dataset_names(text: str) -> tuple[str, ...]:
    """The names in a list separated by commas; a path that is there as a whole is one name, whatever commas it has."""
    if Path(text).expanduser().exists():
        return (text,)
    return tuple(name.strip() for name in text.split(","))


def probabilities(text: str | None, count: int, *, flag: str = "--data.prompt-probs") -> tuple[float, ...]:
    """The weights of `count` datasets as typed, "0.7,0.3"; nothing for None. Raises DataError unless they count and sum to one."""
    if text is None:
        return ()
    words = text.split(",")
    try:
        weights = tuple(float(word) for word in words)
    except ValueError as error:
        raise DataError(f"{flag} {text!r} is no list of numbers; write one for each dataset, such as 0.7,0.3") from error
    if len(weights) != count:
        raise DataError(f"{flag} {text!r} has {len(weights)} weights for {count} datasets; write one for each, in their order")
    if not all(0 < weight <= 1 for weight in weights):  # also where one is no number at all
        raise DataError(f"{flag} {text!r} has a weight outside (0, 1]; leave out a dataset that is never to be drawn from")
    if abs(sum(weights) - 1) > 1e-6:
        scaled = ",".join(f"{weight / sum(weights):.4g}" for weight in weights)
        raise DataError(f"{flag} {text!r} sums to {sum(weights):g}, not to 1; in these proportions: {scaled}")
    return weights


def open_datasets(
    text: str, *, split: str = "train", max_samples: int = ALL, flag: str = FLAG, split_flag: str = SPLIT_FLAG
) -> tuple[Dataset, ...]:
    """Every dataset of a list, with the first `max_samples` rows of its `split` each; the flags are where they were asked for.

    Raises DataError: a path or name that leads nowhere, another format, a damaged file, an unknown split, no rows.
    """
    part = read_split(split, flag=split_flag)
    names = dataset_names(text)
    if not all(names):
        raise DataError(f"{flag} {text!r} has an empty name; write names separated by single commas")
    return tuple(_open(name, part, max_samples=max_samples, flag=flag) for name in names)


def open_one(name: str, *, split: str = "train", max_samples: int = ALL, flag: str = FLAG) -> Source:
    """One dataset as one source. Raises as `open_datasets` and `joined`."""
    datasets = open_datasets(name, split=split, max_samples=max_samples, flag=flag)
    if len(datasets) != 1:
        raise DataError(f"{flag} {name!r} names {len(datasets)} datasets, and this command reads one; join their files in a folder")
    return joined(datasets[0])


def joined(dataset: Dataset) -> Source:
    """A dataset as one source, its files end to end. Raises DataError for lines of several files that are no rows."""
    first, *others = dataset.sources
    if not others:
        return first
    if faulty := [source for source in dataset.sources if source.bad]:
        raise DataError("\n".join(str(bad_rows_error(one.name, one.bad, rows=len(one.rows) + len(one.bad))) for one in faulty))
    fingerprint = hashlib.blake2b(" ".join(source.fingerprint for source in dataset.sources).encode(), digest_size=16).hexdigest()
    seen = tuple(dict.fromkeys(name for source in dataset.sources for name in source.columns))
    return Source(name=dataset.name, fingerprint=fingerprint, rows=Joined([source.rows for source in dataset.sources]), seen=seen)


def _open(name: str, part: Split, *, max_samples: int, flag: str) -> Dataset:
    if name.startswith(reasoning.PREFIX):
        if part.name != "train":
            raise unknown_split(part.name, ["train"], shown=name, flag=part.flag)
        task = reasoning.source(name, max_samples=max_samples)
        return Dataset(name=name, sources=_cut((task,), *part.bounds(len(task.rows))))
    path = Path(name).expanduser()
    needed = max_samples if part.first_rows is None and part.stop is None and part.start is None else part.first_rows or ALL
    if path.is_dir():
        sources = _folder(name, path, part, needed, flag=flag)
    elif not path.exists() and (at_hub := _of_hub(name)) is not None:
        shown, files = download(at_hub, part.name, flag=flag, split_flag=part.flag)
        sources = tuple(replace(read_file(str(file), max_samples=needed, flag=flag), name=f"{shown}/{file.name}") for file in files)
    else:
        if part.name != "train" and path.exists():
            raise unknown_split(part.name, ["train"], shown=f"{name} (a file alone)", flag=part.flag)
        sources = (read_file(name, max_samples=needed, flag=flag),)
    rows = sum(len(source.rows) for source in sources)
    start, stop = part.bounds(rows)
    cut = _cut(sources, start, min(stop, start + max_samples))
    if not any(len(source.rows) or source.bad for source in cut):
        raise DataError(f"{part.flag} {part.text!r} is empty: {name} has {rows} rows; ask for another part")
    return Dataset(name=name, sources=cut)


def _of_hub(name: str) -> HubName | None:
    """A name of the hub, unless its first part is a folder here, or its last part names a data file: then a path was meant."""
    found = hub_name(name)
    meant = found is None or name.endswith(SUFFIXES) or Path(found.repository.partition("/")[0]).is_dir()
    return None if meant else found


def _folder(name: str, path: Path, part: Split, needed: int, *, flag: str) -> tuple[Source, ...]:
    if splits := saved_splits(path):
        if part.name not in splits:
            raise unknown_split(part.name, list(splits), shown=name, flag=part.flag)
        return (read_saved(name, splits[part.name], max_samples=needed),)
    inside = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
    if not any(file.endswith(SUFFIXES) for file in inside):
        return (read_file(name, max_samples=needed, flag=flag),)  # which says what a directory without data files is told
    card = card_of(path / "README.md", shown=name) if "README.md" in inside else {}
    files = split_files(inside, card, config=None, shown=name)
    if part.name not in files:
        raise unknown_split(part.name, list(files), shown=name, flag=part.flag)
    return tuple(read_file(str(path / file), max_samples=needed, flag=flag) for file in files[part.name])


def _cut(sources: Sequence[Source], start: int, stop: int) -> tuple[Source, ...]:
    """The rows [start, stop) of all sources end to end; lines that are no rows stay where they lie between rows that do."""
    cut: list[Source] = []
    before = 0
    for source in sources:
        low, high = max(0, start - before), min(len(source.rows), stop - before)
        before += len(source.rows)
        if (low, high) == (0, len(source.rows)):
            cut.append(source)
        elif low < high:
            first, last = source.rows[low].line, source.rows[high - 1].line
            bad = tuple(row for row in source.bad if first <= row.line <= last)
            cut.append(replace(source, rows=Span(source.rows, low, high), bad=bad, first=low, seen=()))
    return tuple(cut)
