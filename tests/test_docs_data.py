"""What docs/data.md shows is what works, and the tables it has are those of the code."""

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hone.datasets.prompt_layouts import PROMPT_LAYOUTS
from hone.datasets.templates import BUILTIN
from hone.datasets.tokenise import SAMPLED_ROWS, UPFRONT_ROWS
from hone.launch.cli import main
from tests.datasets.test_masks import tokenizer_with

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.replace("\\\n", " ").splitlines()]
ROWS = [{"input": f"{count}+1=", "answer": str(count + 1)} for count in range(20)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "more.parquet")
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}")
    words = shlex.split(command)
    assert words[:3] == ["uv", "run", "launch"]
    if words[3] == "template":
        sound = tokenizer_with(BUILTIN["chatml"], "<|im_end|>")
        sound.save_pretrained(tmp_path / "DIR")
        assert main(words[3:]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert all(
            any(f" {name} " in line for line in lines) for name in ("prefix", "mask", "stop token", "SFT = RL", "BOS", "thinking toggle")
        )
        return
    assert main([*words[3:], "--print-config"]) == 0, capsys.readouterr().err
    assert 'prompt_dataset = "rows.jsonl' in capsys.readouterr().out


def test_the_tables_and_numbers_are_those_of_the_code() -> None:
    for layout in PROMPT_LAYOUTS:
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {layout.name} |")]
        assert f"| `{layout.prompt}` |" in row and all(f"`{name}`" in row for name in layout.needs)
        assert layout.label is None or f"`{layout.label}`" in row
        assert layout.reward is None or f"`{layout.reward}`" in row
    assert ", ".join(f"`{name}`" for name in BUILTIN) in PAGE.replace("\n", " ")
    assert f"Up to {UPFRONT_ROWS:,} rows" in PAGE and f"a sample of {SAMPLED_ROWS:,}" in PAGE
