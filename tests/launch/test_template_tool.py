"""`launch template check`: what it prints, how it ends, and what it refuses."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hone.launch.cli import main
from tests.launch.conftest import CHATML


def test_a_sound_template_ends_with_0_and_a_faulty_one_with_3(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert main(["template", "check", str(tmp_path), "--data.tokenizer-chat-template", "chatml"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 9 and all(line.startswith("ok ") for line in told)
    # Asks for no answer, whether it is asked to or not.
    tokenizer.chat_template = CHATML.split("{% if add_generation_prompt %}")[0]
    tokenizer.save_pretrained(tmp_path)
    assert main(["template", "check", str(tmp_path)]) == 3
    assert any(line.startswith("BAD  prefix") or line.startswith("BAD  mask") for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("template", 2, "`check` and a model, not nothing"),
        ("template check", 2, "`check` and a model, not check"),
        ("template chek m", 2, "`check` and a model, not chek m"),
        ("template check m --data.kwargs x", 2, "unknown option --data.kwargs"),
        ("template check m --data.chat-template-kwargs", 2, "--data.chat-template-kwargs takes a value"),
        ("template check ./nowhere", 3, "the model directory './nowhere' does not exist"),
    ],
)
def test_what_cannot_be_checked_is_refused(words: str, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == code
    assert said in capsys.readouterr().err


def test_the_check_needs_no_ray(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    code = f"import sys; from hone.launch.cli import main; main(['template', 'check', {str(tmp_path)!r}]); sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
