"""`launch score MODEL ROWS OUT`: every row of a file with its score, by a reward model or by reward functions."""

import asyncio
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hone.datasets.errors import BadRow, DataError, bad_rows_error
from hone.datasets.labelled import ExchangeRow, LabelledSet, TokenRow
from hone.datasets.offline_config import DemonstrationData
from hone.datasets.records import Source
from hone.launch.errors import Problem, UsageError
from hone.launch.observe.files import replaced
from hone.launch.tools.words import new_place, read

USAGE = (
    "launch score MODEL ROWS OUT [--input-key NAME] [--answer-key NAME] [--label-key NAME] [--apply-chat-template] [--normalize] "
    "[--max-len N] [--batch-size N] [--param-dtype fp32|bf16|fp16], or launch score --function FILE.py ROWS OUT ..."
)
OPTIONS = ("--input-key", "--answer-key", "--label-key", "--max-len", "--batch-size", "--param-dtype", "--function")
FLAGS = {"--data.input-key": "--input-key", "--data.output-key": "--answer-key", "--data.apply-chat-template": "--apply-chat-template"}
"""What a program's options are called here."""
SWITCHES = ("--apply-chat-template", "--normalize")

Batches = Iterator[list[float]]


def run(words: Sequence[str]) -> int:
    """Score; returns the exit code. Raises UsageError, DataError, ModelError, RewardError."""
    by_function = any(word.partition("=")[0] == "--function" for word in words)
    places = ("ROWS", "OUT") if by_function else ("MODEL", "ROWS", "OUT")
    asked = read(words, places=places, options=OPTIONS, switches=SWITCHES, usage=USAGE)
    new_place(asked["OUT"], where=f"argument {len(places) + 1}")
    config = DemonstrationData(
        input_key=asked.get("--input-key"),
        output_key=asked.get("--answer-key"),
        apply_chat_template="--apply-chat-template" in asked,
        max_len=_number(asked, "--max-len", 2048),
    )
    size = _number(asked, "--batch-size", 64)
    from hone.datasets.layouts import exchange_rows
    from hone.datasets.reading import open_one
    from hone.learner.model_files import check_model

    if not by_function:
        check_model(asked["MODEL"])

    source = open_one(asked["ROWS"], flag="ROWS")
    try:
        rows = exchange_rows(source, config)
    except DataError as error:  # which speaks of the options of a whole program
        text = str(error)
        for theirs, ours in FLAGS.items():
            text = text.replace(theirs, ours)
        raise DataError(text) from error
    score = _by_function if by_function else _by_model
    written, total = 0, 0.0
    place = Path(asked["OUT"])
    place.parent.mkdir(parents=True, exist_ok=True)
    scored: list[Any] = []
    with replaced(place) as out:
        for scores in score(asked, config, source, rows, size):
            for row, value in enumerate(scores, start=written):
                text = json.dumps({**source.rows[row].columns, "score": value}, ensure_ascii=False, default=str)
                if place.suffix == ".parquet":
                    scored.append(json.loads(text))
                else:  # half a surrogate pair, which UTF-8 cannot hold, is written as JSON's escape
                    out.write(text.encode("utf-8", "backslashreplace") + b"\n")
            written, total = written + len(scores), total + math.fsum(scores)
        if place.suffix == ".parquet":
            _write_parquet(scored, out)
    print(f"{written} rows with their scores are in {asked['OUT']}, mean {total / written:.4f}")
    return 0


def _write_parquet(rows: Sequence[Mapping[str, Any]], out: BinaryIO) -> None:
    """The rows as Parquet. A column whose values are of several types is their JSON text."""
    import pyarrow as pa
    import pyarrow.parquet

    from hone.launch.observe.rollout_table import storable

    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [storable(row.get(name)) for row in rows]
        try:
            columns[name] = pa.array(values)
        except pa.ArrowException:  # half of them are texts and half of them numbers, say
            columns[name] = pa.array([None if value is None else json.dumps(value) for value in values])
    pyarrow.parquet.write_table(pa.table(columns), out, compression="zstd")


def _number(asked: dict[str, str], name: str, default: int) -> int:
    text = asked.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise UsageError([Problem(what=f"{name} {text} is no number of at least 1", mend=f"the default is {default}", where=name)])
    return int(text)


def _by_model(asked: dict[str, str], config: DemonstrationData, source: Source, rows: LabelledSet[ExchangeRow], size: int) -> Batches:
    import transformers

    from hone.datasets.exchanges import Encoder, cut
    from hone.datasets.tokenizer import load_tokenizer
    from hone.launch.labels import packed
    from hone.launch.local import LocalGroup
    from hone.learner.config import DeepSpeedConfig, RefConfig
    from hone.learner.learner import Learner
    from hone.learner.roles import DTYPES, RoleSpec

    transformers.utils.logging.disable_progress_bar()
    dtype = asked.get("--param-dtype", "fp32")
    if dtype not in DTYPES:
        raise UsageError([Problem(what=f"there is no number format {dtype}", mend=f"one of {', '.join(DTYPES)}", where="--param-dtype")])
    encoder = Encoder(load_tokenizer(asked["MODEL"]), config)
    most = max(config.max_len, 16192)
    learner = Learner(
        roles={"reward": RoleSpec(kind="reward", model=asked["MODEL"], config=RefConfig(), total_steps=0)},
        ds=DeepSpeedConfig(param_dtype=dtype, zero_stage=0, normalize_reward="--normalize" in asked),  # pyright: ignore[reportArgumentType] - it is one of DTYPES
        backend="single",
        rank=0,
        world_size=1,
        master_addr="127.0.0.1",
        master_port=0,
        seed=0,
        max_tokens=most,
    )
    group = LocalGroup(learner, cut={"max_tokens": most})
    for start in range(0, len(rows.rows), size):
        encoded: list[TokenRow] = []
        for row in rows.rows[start : start + size]:
            found = encoder.encode(row.exchange, line=row.line)
            if isinstance(found, BadRow):
                raise bad_rows_error(source.name, [found], rows=len(rows.rows))
            kept = cut(found.rows[-1], config.max_len)
            if kept is None:
                raise DataError(
                    f"{source.name}:{row.line}: the prompt leaves no room for an answer within --max-len {config.max_len}; raise it"
                )
            encoded.append(kept)
        yield group.scores("reward", packed(encoded)).tolist()
    group.close()


def _by_function(asked: dict[str, str], config: DemonstrationData, source: Source, rows: LabelledSet[ExchangeRow], size: int) -> Batches:
    from hone.rollout.config import RewardConfig
    from hone.rollout.rewards import judges
    from hone.rollout.rewards.result import RewardItem

    label_key = asked.get("--label-key")
    if missing := [row.line for row in source.rows if label_key is not None and label_key not in row.columns]:
        raise DataError(f"{source.name}:{missing[0]}: no column {label_key!r}; name one with --label-key")
    settings = RewardConfig(remote_url=asked["--function"])
    judges.check(settings)
    judge = judges.build(settings, default="")
    try:
        with asyncio.Runner() as runner:
            for start in range(0, len(rows.rows), size):
                items: list[RewardItem] = []
                for row, one in ((rows.rows[place], source.rows[place]) for place in range(start, min(start + size, len(rows.rows)))):
                    prompt, answer = row.exchange.prompt, row.exchange.answer
                    if not isinstance(prompt, str) or not isinstance(answer, str):
                        raise DataError(
                            f"{source.name}:{row.line}: reward functions judge texts, not messages; give prompt and answer as texts"
                        )
                    label = None if label_key is None else one.columns[label_key]
                    items.append(RewardItem(prompt_id=row.uid, query=prompt + answer, prompt=prompt, label=label))
                yield [judgement.reward for judgement in runner.run(judge.judge(items))]
    finally:
        judge.close()
