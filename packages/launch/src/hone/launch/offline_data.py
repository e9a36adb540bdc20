"""The run's labelled rows: from the configuration to samples the loop draws, with the tokenizer the model comes with."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hone.datasets.chat import template_problems
from hone.datasets.errors import DataError
from hone.datasets.labelled import LabelledSet, Samples
from hone.datasets.layouts import MARGIN, exchange_rows, image_faults, judged_rows, pair_rows, text_rows
from hone.datasets.lazy import Joined
from hone.datasets.offline_config import LabelledData, SFTData
from hone.datasets.reading import joined, open_datasets, probabilities
from hone.datasets.records import Source
from hone.datasets.rows_stream import SampleStream
from hone.datasets.samples import samples_of
from hone.datasets.schemas import stamps
from hone.datasets.step_rows import steps_rows
from hone.datasets.stream import StreamState
from hone.datasets.tasks import labelled_arithmetic as builtin_rows
from hone.launch.offline_config import ComparedConfig, OfflineConfig, RMConfig

if TYPE_CHECKING:
    import transformers

BUILT_IN_ROWS = 10_000
DATA_FLAG, EVAL_FLAG = "--data.dataset", "--eval.dataset"
SPLIT_FLAGS = {DATA_FLAG: "--data.dataset-split", EVAL_FLAG: "--eval.split"}
EVALUATION_SEED = 1_000_003
"""Added to the run's seed, so that the built-in task's rows for evaluation are drawn apart from those that are learnt."""

Reader = Callable[[Source, Any], LabelledSet[Any]]


def _demonstrations(source: Source, config: Any) -> LabelledSet[Any]:
    return text_rows(source, config) if isinstance(config, SFTData) and config.pretrain_mode else exchange_rows(source, config)


READERS: dict[str, tuple[Reader, Callable[[int, int], Source]]] = {
    "sft": (_demonstrations, builtin_rows.demonstrations),
    "kd": (_demonstrations, builtin_rows.demonstrations),
    "rm": (pair_rows, builtin_rows.pairs),
    "dpo": (pair_rows, builtin_rows.pairs),
    "kto": (judged_rows, builtin_rows.judged),
    "prm": (steps_rows, builtin_rows.steps),
}
"""Command -> what reads its rows, and where the built-in ones come from."""


@dataclass(frozen=True, kw_only=True)
class OfflineData:
    """Samples ready to be drawn, those held out for evaluation, and the tokenizer they were made with."""

    name: str
    samples: Samples
    held_out: Samples | None
    stream: SampleStream
    tokenizer: "transformers.PreTrainedTokenizerBase"


def read_rows(config: OfflineConfig, path: str, *, split: str, at_most: int, flag: str) -> LabelledSet[Any]:
    """The validated rows of a dataset, or of several end to end, with their shares of the draws. Raises DataError.

    Asked again for the same settings and unchanged files, it gives the same answer without reading.
    """
    return _read_rows(config.verb, config.reading, path, split, at_most, flag, stamps(path))


@functools.lru_cache(maxsize=2)
def _read_rows(
    verb: str, config: LabelledData, path: str, split: str, at_most: int, flag: str, stamped: tuple[object, ...]
) -> LabelledSet[Any]:
    datasets = open_datasets(path, split=split, max_samples=at_most, flag=flag, split_flag=SPLIT_FLAGS[flag])
    weights = probabilities(config.dataset_probs if flag == DATA_FLAG else None, len(datasets), flag="--data.dataset-probs")
    sets: list[LabelledSet[Any]] = []
    errors: list[DataError] = []
    for dataset in datasets:
        try:
            source = joined(dataset)
            image_faults(source)
            sets.append(READERS[verb][0](source, config))
        except DataError as error:
            errors.append(error)
    if errors:
        raise DataError("\n".join(map(str, errors)))
    if len(sets) == 1:
        return sets[0]
    return LabelledSet(
        name=", ".join(one.name for one in sets),
        fingerprint=hashlib.blake2b(" ".join(one.fingerprint for one in sets).encode(), digest_size=16).hexdigest(),
        rows=Joined([one.rows for one in sets]),
        columns=tuple(dict.fromkeys(name for one in sets for name in one.columns)),
        characters=Joined([one.characters for one in sets]),
        sizes=tuple(len(one.rows) for one in sets),
        weights=weights,
    )


def check_template(config: LabelledData) -> None:
    """Raises DataError for a template that cannot be used."""
    if problems := template_problems(config):
        raise DataError("\n".join(problems))


def prepare(config: OfflineConfig, *, model: str, state: StreamState | None = None) -> OfflineData:
    """Read and validate every row, and render and tokenise those that are wanted now; with `state`, go on where a run was saved.

    Raises DataError, TokenizerError.
    """
    from hone.datasets.tokenizer import load_tokenizer, tokenizer_hash

    data, seed = config.reading, config.train.seed
    check_template(data)
    read, built_in = READERS[config.verb]
    if data.dataset is None:
        rows = read(built_in(seed, min(BUILT_IN_ROWS, data.max_samples)), data)
        held_out = read(built_in(seed + EVALUATION_SEED, config.eval.max_samples), data) if config.eval.dataset is None else None
    else:
        rows, held_out = read_rows(config, data.dataset, split=data.dataset_split, at_most=data.max_samples, flag=DATA_FLAG), None
    if config.eval.dataset is not None:
        held_out = read_rows(config, config.eval.dataset, split=config.eval.split, at_most=config.eval.max_samples, flag=EVAL_FLAG)
    tokenizer = load_tokenizer(model)
    hashed = tokenizer_hash(tokenizer)
    # A reference that is gone before training is asked for all rows before the first is learnt from.
    upfront = isinstance(config, ComparedConfig) and "ref_logp" in config.algo.needs and config.ref.when == "before"
    samples = samples_of(rows, tokenizer, data, tokenizer_hash=hashed, upfront=upfront)
    if isinstance(config, RMConfig) and config.loss == "log_exp" and MARGIN in rows.columns:
        told = f"the column {MARGIN!r} is not read: --loss log_exp knows no margins, --loss sigmoid does"
        samples = replace(samples, notes=(*samples.notes, told))
    # What is held out is measured whole.
    measured = None if held_out is None else samples_of(held_out, tokenizer, data, tokenizer_hash=hashed, upfront=True)
    stream = SampleStream(samples, batch_size=config.train.batch_size, seed=seed, epochs=config.train.max_epochs, state=state)
    return OfflineData(
        name=samples.name,
        samples=samples,
        held_out=measured,
        stream=stream,
        tokenizer=tokenizer,
    )


def settled(config: OfflineConfig, tokenizer: "transformers.PreTrainedTokenizerBase") -> OfflineConfig:
    """The configuration with what only the tokenizer knows: the ids of reward tokens. Raises TokenizerError."""
    from hone.datasets.offline_config import StepData
    from hone.datasets.step_rows import reward_token_ids

    if not isinstance(config.data, StepData):
        return config
    return replace(config, algo=replace(config.algo, reward_tokens=reward_token_ids(config.data, tokenizer)))  # pyright: ignore[reportCallIssue, reportArgumentType] - that of prm
