"""The samples of one step as a Parquet file: rollouts/step_000001.parquet, one row a sample (or segment).

Columns with a fixed type: prompt_id, sample, prompt, response, label (JSON text), reward, score, truncated, tokens (sampled ids),
stop and stop_token_ids (what ends a response beside the model's own end), version. Other keys of the rows become columns of the type
their values show.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hone.launch.observe.files import replaced

if TYPE_CHECKING:
    pass


def write_rollouts(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows. A key that a row lacks is null there. Raises ValueError for an empty list."""
    import pyarrow as pa
    import pyarrow.parquet

    if not rows:
        raise ValueError(f"no rows for {path.name}: a step without samples has nothing to write; record the dropped prompts in the ledger")
    types: dict[str, pyarrow.DataType] = {
        "prompt_id": pa.string(),
        "sample": pa.int32(),
        "prompt": pa.string(),
        "response": pa.string(),
        "label": pa.string(),
        "reward": pa.float64(),
        "score": pa.float64(),
        "truncated": pa.bool_(),
        "tokens": pa.list_(pa.int32()),
        "stop": pa.list_(pa.string()),
        "stop_token_ids": pa.list_(pa.int32()),
    }
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: pa.array([_cell(name, row.get(name)) for row in rows], type=types.get(name)) for name in names}
    with replaced(path) as file:
        pyarrow.parquet.write_table(pa.table(columns), file, compression="zstd")


def _cell(name: str, value: Any) -> Any:
    if name == "label":
        return json.dumps(value, default=str)
    return storable(value)


def storable(value: Any) -> Any:
    """The value as Parquet holds it, in UTF-8: text from a JSON file may hold a lone surrogate, which is no character, and is escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [storable(one) for one in value]
    return {name: storable(one) for name, one in value.items()} if isinstance(value, dict) else value
