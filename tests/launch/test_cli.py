"""The command as a whole: screens, exit codes, and what is not imported on the way."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hone.launch import cli, machine
from hone.launch.config import PolicyGradientConfig, default_config
from hone.launch.schema import settings
from hone.launch.verbs import VERBS

HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers", "tyro")


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def program(monkeypatch: pytest.MonkeyPatch, run: Callable[..., int]) -> None:
    """Put `run` in the place of the training program, whose import is not what is tested here."""
    monkeypatch.setitem(sys.modules, "hone.launch.programs.policy_gradient", SimpleNamespace(run=run))  # pyright: ignore[reportArgumentType]


def imported_by(*words: str) -> tuple[int, set[str]]:
    """Exit code of a fresh `launch`, and which of the heavy packages it imported."""
    script = f"""
import json, sys
from hone.launch.cli import main
code = main({list(words)!r})
print("\\n" + json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, names = json.loads(done.stdout.splitlines()[-1])
    return code, set(names)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_front_screen_lists_every_command_and_the_first_to_try(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, out, err = asked(capsys, *words)
    assert (code, err) == (0, "")
    lines = [line.split(None, 1) for line in out.splitlines() if line]
    for name, verb in VERBS.items():
        assert [name, verb.summary] in lines
    assert "launch ppo" in out.split("reinforcement learning")[0]
    assert max(map(len, out.splitlines())) <= 80


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert asked(capsys, "--version") == (0, f"launch {version('hone-launch')}\n", "")


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_option_with_range_default_and_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = asked(capsys, verb, "--help")
    assert (code, err) == (0, "")
    flat = " ".join(out.split("\ngeneral\n")[1].split())
    for setting in settings(default_config(verb)).values():
        entry = re.split(rf"default {re.escape(setting.written)}[];]", flat.split(f" {setting.flag} ", 1)[1])[0]
        assert setting.doc in entry, setting.name
        assert setting.limits in entry, setting.name
        assert len(entry) < 500, setting.name  # the default found is its own, not that of an option further down
    assert max(len(line) for line in out.splitlines() if "launch " not in line) <= int(columns)
    assert all(f"--{option}" in out for option in ("config", "recipe", "print-config", "debug"))


def test_help_for_a_word_shows_the_options_that_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = asked(capsys, "ppo", "--help", "clip")
    assert code == 0
    assert "--algo.clip.low" in out and "--algo.value-clip" in out
    assert "--train.seed" not in out
    assert asked(capsys, "ppo", "--help=clip")[1] == out
    code, _, err = asked(capsys, "ppo", "--help", "qqq")
    assert code == 2
    assert "no option of `launch ppo` has qqq in it" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # spec C.3 row 1
        (["pppo"], "unknown command `pppo`\n     at  command line\n     fix did you mean `launch ppo`?"),
        (["zebra"], "commands: ppo, reinforce, "),
        (["dr-grpo"], "did you mean `launch dr_grpo`?"),
        # names that others have for an algorithm
        (["group_norm"], "did you mean `launch grpo`?"),
        (["reinforce++"], "did you mean `launch reinforce`?"),
        (["--rollout.batch-size", "3"], "a command comes first"),
        (["ppo", "--actor.learing-rate", "1e-6"], "did you mean --actor.adam.lr?"),
    ],
)
def test_a_usage_error_ends_with_2_and_no_traceback(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    code, out, err = asked(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_words_rules_and_files_are_reported_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = (
        f"ppo --train.seed x --pretrain y --rollout.temperature 9 --ckpt.save-steps 0 --reward.remote-url {tmp_path}/r.py --run.dir ../x"
    )
    code, _, err = asked(capsys, *words.split())
    assert code == 2
    assert err.startswith("error: 6 problems; nothing was started\n")
    for part in ("got `x`", "--actor.model-name-or-path", "[0.01, 2]", "save_steps 0", "r.py does not exist", "it contains `..`"):
        assert part in err


def test_a_fault_of_one_kind_ends_with_that_kinds_code(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert asked(capsys, "ppo", "--reward.remote-url", f"{tmp_path}/r.py")[0] == 6


def test_print_config_prints_and_starts_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # row 17
    program(monkeypatch, lambda *_: pytest.fail("started"))
    words = "grpo --print-config --train.seed 7 --recipe none --data.max-len 512 --rollout.max-new-tokens 8"
    code, out, err = asked(capsys, *words.split())
    assert (code, err) == (0, "note: ds.param_dtype bf16 is several times slower than fp32 without a GPU; --ds.param-dtype fp32\n")
    assert out.startswith('verb = "grpo"\n')
    assert "seed = 7                                      # flag --train.seed" in out


def test_the_program_gets_the_configuration_and_its_sources(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[PolicyGradientConfig, dict[str, str]]] = []
    monkeypatch.setattr(machine, "visible_gpus", lambda: 0)
    program(monkeypatch, lambda config, sources: got.append((config, sources)) or 7)
    code, out, err = asked(capsys, "ppo", "--train.seed", "7")
    assert (code, out) == (7, "")
    assert err.startswith("recipe laptop: no GPU is visible")
    ((config, sources),) = got
    assert config.train.seed == 7
    assert sources["train.seed"] == "flag --train.seed"
    assert set(sources) == set(settings(config))


@pytest.mark.parametrize(
    ("error", "code", "said"), [(KeyboardInterrupt(), 130, "interrupted"), (RuntimeError("boom"), 1, "RuntimeError: boom")]
)
def test_what_a_program_raises_becomes_a_message_and_a_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def run(config: PolicyGradientConfig, sources: dict[str, str]) -> int:
        raise error

    program(monkeypatch, run)
    got, _, err = asked(capsys, "ppo")
    assert got == code
    assert said in err and "Traceback" not in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: PolicyGradientConfig, sources: dict[str, str]) -> int:
        assert config.run.debug
        raise RuntimeError("boom")

    program(monkeypatch, run)
    assert "Traceback" in asked(capsys, "ppo", "--debug")[2]


@pytest.mark.parametrize("words", [[], ["--version"], ["pppo"]])
def test_the_front_screen_imports_nothing_heavy(words: list[str]) -> None:
    assert imported_by(*words)[1] == set()


@pytest.mark.parametrize(("words", "code"), [(["ppo", "--help"], 0), (["ppo", "--trian.seed", "3"], 2), (["grpo", "--print-config"], 0)])
def test_help_and_refusals_cost_one_import_of_torch(words: list[str], code: int) -> None:
    got, names = imported_by(*words)
    assert got == code
    assert names <= {"torch", "tyro"}


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_a_reader_that_has_enough_is_no_error(word: str) -> None:
    script = f"from hone.launch.cli import main; raise SystemExit(main(['{word}']))"
    pipe = f"'{sys.executable}' -c \"{script}\" | true"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    assert subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=True, env=buffered).stderr == ""
