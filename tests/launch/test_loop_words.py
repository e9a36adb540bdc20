"""What is typed for the loops: names of other projects, recipes, engines, refusals before anything starts."""

from pathlib import Path

import pytest

from hone.launch.cli import main
from hone.launch.commands import defaults
from hone.launch.errors import Problem
from hone.launch.loop_rules import broken
from hone.launch.loop_verbs import LOOPS
from hone.launch.loops.state import FREE, deciding
from hone.launch.offline_config import LOSSES
from hone.launch.recipes import CONDITIONED, LOOP_BUILT_IN, LOOP_RECIPES
from hone.launch.resolve import resolve
from hone.launch.schema import from_toml, settings
from tests.launch.asking import only, settled, typed

OWN = "--model.model-name-or-path m --data.prompt-dataset p.jsonl --reward.remote-url r.py"


def crossed(line: str, *, gpus: int = 0) -> list[Problem]:
    verb, *argv = line.split()
    return list(broken(resolve(verb, argv, gpus=gpus), gpus))


@pytest.mark.parametrize("verb", LOOPS)
@pytest.mark.parametrize(
    "words", ["--recipe laptop", f"--recipe laptop {OWN}", f"--recipe none {OWN}", f"--recipe none {OWN} --model.num-gpus-per-node 2"]
)
def test_defaults_and_recipes_break_no_rule(verb: str, words: str) -> None:
    assert crossed(f"{verb} {words}", gpus=2 * ("none" in words)) == []


def test_recipes_name_settings_and_give_them_values_they_accept() -> None:
    known = {name: one for verb in LOOPS for name, one in settings(defaults(verb)).items()}
    for name, value in (LOOP_RECIPES["laptop"] | LOOP_BUILT_IN["laptop"] | CONDITIONED["laptop"]).items():
        assert from_toml(known[name], value) == value


@pytest.mark.parametrize(
    ("words", "engine", "backend"),
    [
        ("", "transformers", "local"),
        (OWN, "vllm", "local"),
        ("--rollout.engine vllm", "vllm", "local"),
        (f"{OWN} --ds.zero-stage 3", "vllm", "ray"),
        ("--model.num-gpus-per-node 2", "transformers", "ray"),
    ],
)
def test_the_built_in_model_needs_no_vllm_and_one_rank_no_ray(words: str, engine: str, backend: str) -> None:
    config = settled(f"rejection-sampling {words}").config
    assert (config.rollout.engine, config.run.backend) == (engine, backend)
    assert (config.ds.zero_stage == 0) == (backend == "local")


@pytest.mark.parametrize("loss", LOSSES["dpo"])
def test_a_loss_brings_its_own_settings(loss: str) -> None:
    config = settled(f"iterative-dpo --loss {loss}").config
    assert config.algo == LOSSES["dpo"][loss]
    assert ("ref.follows" in settings(config)) == (loss not in ("simpo", "orpo"))
    assert config.training("m", rows="r", directory=None).algo == config.algo


@pytest.mark.parametrize(
    ("line", "mend"),
    [
        ("rejection-sampling --best_of_n 4", "use --rollout.n-samples-per-prompt"),
        ("conditional-sft --reward_template x", "use --condition.template"),
        ("conditional-sft --normalize_reward", "use --condition.normalize"),
        ("rejection-sampling --rollout_batch_size 4", "use --rollout.batch-size"),
        ("rejection-sampling --pretrain m", "use --model.model-name-or-path"),
        ("iterative-dpo --beta 0.2", "use --algo.beta"),
        ("iterative-dpo --ref.folows first", "did you mean --ref.follows?"),
        ("rejection-sampling --select.abov 1", "did you mean --select.above?"),
        ("rejection-sampling --condition.best 1", "it belongs to `launch conditional-sft`"),
        ("conditional-sft --train.iteration 3", "did you mean --train.iterations?"),
    ],
)
def test_other_names_are_answered_with_the_one_here(line: str, mend: str) -> None:
    assert mend in only(typed(line)).mend


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("rs", "rejection-sampling"),
        ("iter_dpo", "iterative-dpo"),
        ("csft", "conditional-sft"),
        ("rejection-samplng", "rejection-sampling"),
        ("interactive_chat", "chat"),
    ],
)
def test_other_names_of_the_commands_are_known(name: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert f"did you mean `launch {command}`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("rejection-sampling --data.prompt-dataset p.jsonl --reward.remote-url r.py", "the built-in model reads only"),
        ("rejection-sampling --model.model-name-or-path m --data.prompt-dataset p.jsonl", "your own prompts need a reward"),
        (f"rejection-sampling {OWN} --reward.model-name-or-path rm", "both say who judges"),
        (f"rejection-sampling {OWN} --reward.normalize-enable", "none is named"),
        ("rejection-sampling --rollout.n-samples-per-prompt 1", "several are needed"),
        ("iterative-dpo --rollout.temperature 0", "there is nothing to choose among"),
        ("iterative-dpo --train.micro-batch-size 1", "holds no pair"),
        ("rejection-sampling --rollout.max-new-tokens 64", "leaves no room for a prompt"),
        ("rejection-sampling --train.max-tokens-per-gpu 10", "does not fit a micro-batch of 10"),
        ("conditional-sft --condition.template {input}", "needs {input} and {reward}"),
        ("rejection-sampling --ckpt.load-enable", "none is named"),
        ("rejection-sampling --run.dir r --ckpt.load-enable --resume r", "both say where to go on"),
        ("rejection-sampling --ckpt.save-steps 0", "neither when nor never"),
        ("rejection-sampling --ds.load-in-4bit", "nothing would train"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(line: str, told: str) -> None:
    assert told in only(crossed(line)).what


def test_what_is_not_there_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    line = f"rejection-sampling {OWN}".replace(" m ", " ./m ").split()
    assert main(line) == 3
    told = capsys.readouterr().err
    assert "./m" in told and "p.jsonl" in told and "r.py" in told
    assert main(["rejection-sampling", "--resume", "latest"]) == 4 and main(["rejection-sampling", "--resume", "nowhere"]) == 4
    assert "no run of rejection-sampling" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_what_may_change_when_a_run_goes_on_decides_nothing() -> None:
    one, other = (
        deciding(settled(f"iterative-dpo {words}").config)
        for words in ("", "--run.threads 2 --train.iterations 9 --vllm.enforce-eager False")
    )
    assert one == other and deciding(settled("iterative-dpo --algo.beta 0.3").config) != one
    assert all(any(name.startswith(free) for name in settings(defaults("iterative-dpo"))) for free in FREE)
