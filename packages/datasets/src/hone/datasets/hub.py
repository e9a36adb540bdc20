"""Datasets of the Hugging Face hub: a name into files of one commit, downloaded into huggingface_hub's own cache.

"owner/name", with ":configuration" and "@revision" (a commit, tag or branch; main without). What is read is always the files of
one commit, and that commit is part of the name in every message and in the run. Scripts that come with a dataset never run.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from hone.datasets.errors import DataError
from hone.datasets.splits import card_of, split_files, unknown_split

NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A dataset of the hub as it was typed."""

    repository: str
    config: str | None
    revision: str | None


def hub_name(text: str) -> HubName | None:
    """The dataset of the hub that `text` names, if it has the form of one."""
    match = NAME.fullmatch(text)
    return None if match is None else HubName(**match.groupdict())


def download(name: HubName, split: str, *, flag: str, split_flag: str) -> tuple[str, list[Path]]:
    """A split's files, and the dataset's name with its commit. Raises DataError: not there, gated, no network, unknown split."""
    from huggingface_hub import HfApi, hf_hub_download

    shown = f"hub dataset {name.repository!r}"
    with _explained(name, flag):
        info = HfApi().dataset_info(name.repository, revision=name.revision, timeout=30)
    assert info.sha is not None, "the hub tells the commit of every revision"
    siblings = [sibling.rfilename for sibling in info.siblings or ()]

    def fetch(file: str) -> Path:
        with _explained(name, flag):
            return Path(hf_hub_download(name.repository, file, repo_type="dataset", revision=info.sha))

    card = card_of(fetch(CARD), shown=shown) if CARD in siblings else {}
    splits = split_files(siblings, card, config=name.config, shown=shown)
    if split not in splits:
        raise unknown_split(split, list(splits), shown=shown, flag=split_flag)
    return f"{name.repository}@{info.sha[:12]}", [fetch(file) for file in splits[split]]


class _explained:
    """Turns what the hub's client raises into one DataError with the ways out."""

    def __init__(self, name: HubName, flag: str) -> None:
        self._name, self._flag = name, flag

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        typed = f"{self._flag} {self._name.repository!r}"
        if isinstance(error, GatedRepoError):
            raise DataError(f"{typed} is gated; ask for access on its page, then log in with `hf auth login`") from error
        if isinstance(error, RevisionNotFoundError):
            raise DataError(f"{typed} has no revision {self._name.revision!r}; name a commit, tag or branch of it behind the @") from error
        if isinstance(error, RepositoryNotFoundError):
            raise DataError(
                f"{typed} is neither a file here nor a dataset of the hub; check the spelling, log in with `hf auth login` if it is "
                "private, or name a file"
            ) from error
        network = error is not None and any(kind.__name__ == "HTTPError" for kind in type(error).__mro__)  # of whichever client it uses
        if network or isinstance(error, EntryNotFoundError | OSError):
            what = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{typed} cannot be fetched: {type(error).__name__}: {what}; check the network, or download it beforehand "
                f"(hf download --repo-type dataset {self._name.repository} --local-dir DIR) and name the folder"
            ) from error
