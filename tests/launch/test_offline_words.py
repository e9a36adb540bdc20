"""What is typed for the programs over labelled rows: names of other projects, losses, places, refusals before anything starts."""

from pathlib import Path

import pytest

from hone.launch.cli import main
from hone.launch.commands import defaults, defaults_of, training_verbs
from hone.launch.errors import Problem
from hone.launch.offline_config import LOSSES
from hone.launch.offline_preflight import lacking
from hone.launch.offline_rules import FIGURES, broken
from hone.launch.recipes import OFFLINE_BUILT_IN, OFFLINE_RECIPES
from hone.launch.resolve import resolve
from hone.launch.schema import from_toml, settings
from hone.launch.toml import to_toml
from hone.launch.verbs import OFFLINE
from tests.launch.asking import only, settled, typed

OWN = "--model.model-name-or-path m --data.dataset d.jsonl"
TAUGHT = {"kd": "--teacher.model-name-or-path t"}


def crossed(line: str, *, gpus: int = 0) -> list[Problem]:
    verb, *argv = line.split()
    return list(broken(resolve(verb, argv, gpus=gpus), gpus))


@pytest.mark.parametrize("verb", OFFLINE)
@pytest.mark.parametrize(
    "words", ["--recipe laptop", f"--recipe laptop {OWN}", f"--recipe none {OWN}", f"--recipe none {OWN} --model.num-gpus-per-node 2"]
)
def test_defaults_and_recipes_break_no_rule(verb: str, words: str) -> None:
    assert crossed(f"{verb} {words} {TAUGHT.get(verb, '') if OWN in words else ''}", gpus=2 * ("none" in words)) == []


def test_recipes_name_settings_and_give_them_values_they_accept() -> None:
    known = {name: one for verb in OFFLINE for name, one in settings(defaults(verb)).items()}
    for name, value in (OFFLINE_RECIPES["laptop"] | OFFLINE_BUILT_IN["laptop"]).items():
        assert from_toml(known[name], value) == value


@pytest.mark.parametrize("verb", training_verbs())
def test_a_configuration_is_written_as_it_is_read_again(verb: str, tmp_path: Path) -> None:
    config = settled(f"{verb} --train.seed 7").config
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert settled(f"{verb} --config {tmp_path / 'run.toml'}").config == config


@pytest.mark.parametrize("loss", LOSSES["dpo"])
def test_a_loss_brings_its_own_settings_and_a_file_remembers_it(loss: str, tmp_path: Path) -> None:
    config = settled(f"dpo --loss {loss}").config
    assert config.algo == LOSSES["dpo"][loss] and config.loss == loss
    assert ("ref.model_name_or_path" in settings(config)) == (loss not in ("simpo", "orpo"))
    (tmp_path / "run.toml").write_text(to_toml(config))
    again = settled(f"dpo --config {tmp_path / 'run.toml'}").config
    assert again == config and defaults_of(again).algo == LOSSES["dpo"][loss]


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("sft --adam.lr 1e-4", "model.adam.lr", 1e-4),  # OpenRLHF
        ("sft --lr_warmup_ratio 0.1", "model.lr_warmup_ratio", 0.1),
        ("sft --model.pretrain_mode_enable", "data.pretrain_mode", True),
        ("dpo --model.beta 0.3", "algo.beta", 0.3),
        ("dpo --model.nll_loss_coef 0.2", "algo.nll_loss_coef", 0.2),
        ("dpo --model.loss_type ipo", "loss", "ipo"),
        ("rm --model.loss_type log_exp", "loss", "log_exp"),
    ],
)
def test_names_of_openrlhf_are_understood(line: str, name: str, value: object) -> None:
    answer = settled(line)
    found = answer.config
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value and answer.sources[name].startswith("flag ")


@pytest.mark.parametrize(
    ("line", "mend"),
    [
        ("sft --pretrain m", "use --model.model-name-or-path"),
        ("sft --actor.model-name-or-path m", "use --model.model-name-or-path"),
        ("dpo --beta 0.1", "use --algo.beta"),
        ("kd --teacher_model t", "use --teacher.model-name-or-path"),
        ("sft --dataset d", "use --data.dataset"),
        ("sft --learning_rate 1e-4", "use --model.adam.lr"),
        ("sft --num_train_epochs 2", "use --train.max-epochs"),
        ("sft --data.multiturn", "a column of messages is a conversation"),
        ("sft --ds.packing_samples", "samples are always packed"),
        ("dpo --loss dop", "--loss {dpo,cdpo,ipo,rpo,simpo,orpo}"),
        ("dpo --loss simpo --ref.model-name-or-path r", "it belongs to `launch"),
        ("sft --train.bacth-size 4", "did you mean --train.batch-size?"),
        ("ppo --teacher.top-k 3", "it belongs to `launch kd`"),
    ],
)
def test_other_names_are_answered_with_the_one_here(line: str, mend: str) -> None:
    assert mend in only(typed(line)).mend


@pytest.mark.parametrize(
    ("words", "backend", "stage"),
    [
        ("", "local", 0),
        ("--model.num-gpus-per-node 2", "ray", 2),
        ("--ds.zero-stage 3", "ray", 3),
        ("--ds.adam-offload", "ray", 2),
        ("--run.backend ray", "ray", 2),
        ("--ds.zero-stage 0", "local", 0),
    ],
)
def test_one_rank_without_deepspeed_needs_no_ray(words: str, backend: str, stage: int) -> None:
    config = settled(f"sft {words}").config
    assert (config.run.backend, config.ds.zero_stage) == (backend, stage)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("sft --data.dataset d.jsonl", "the built-in model reads only"),
        (f"sft {OWN} --train.max-tokens-per-gpu 100", "does not fit a micro-batch of 100"),
        (f"dpo {OWN} --data.max-len 400 --train.max-tokens-per-gpu 600", "the two answers of a pair"),
        ("dpo --train.micro-batch-size 1", "holds no pair"),
        ("kto --train.batch-size 1", "KTO's anchor is a mean"),
        (f"kd {OWN}", "a student needs a teacher"),
        (f"kd {OWN} --teacher.model-name-or-path m", "the teacher is the student itself"),
        ("prm --data.reward-tokens +", "not two tokens"),
        ("sft --eval.steps 0", "neither when nor never"),
        (f"sft {OWN} --eval.steps 5", "there are none"),
        ("sft --eval.dataset e.jsonl", "none to learn from"),
        ("sft --data.output-key answer", "describes your own rows"),
        ("rm --ckpt.best-metric-key eval/acuracy", "no evaluation of `launch rm` measures"),
        ("sft --run.backend local --model.num-gpus-per-node 2", "one process, not 2 ranks"),
        ("sft --ckpt.save-steps 0", "neither when nor never"),
        ("sft --ds.load-in-4bit", "nothing would train"),
        ("sft --train.batch-size 1 --model.num-gpus-per-node 2", "some would have none"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(line: str, told: str) -> None:
    assert told in only(crossed(line)).what


def test_more_gpus_than_there_are_is_refused() -> None:
    assert "4 GPUs asked, 2 visible" in only(crossed(f"sft {OWN} --recipe none --model.num-gpus-per-node 4", gpus=2)).what


def test_everything_missing_is_told_at_once(tmp_path: Path) -> None:
    line = f"dpo --model.model-name-or-path {tmp_path}/m --ref.model-name-or-path {tmp_path}/r --data.dataset {tmp_path}/d.jsonl"
    verb, *argv = line.split()
    problems = list(lacking(resolve(verb, argv, gpus=0), 0))
    assert [problem.where.split(" ")[0] for problem in problems] == [
        "--model.model-name-or-path",
        "--ref.model-name-or-path",
        "--data.dataset",
    ]
    assert problems[-1].code == 3


@pytest.mark.parametrize("verb", OFFLINE)
def test_help_tells_of_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    for one in settings(defaults(verb)).values():
        assert one.flag in shown and one.doc, one.name
    assert main(["--help"]) == 0
    assert f"  {verb} " in capsys.readouterr().out


def test_help_of_a_loss_tells_of_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "--loss", "simpo", "--help"]) == 0
    assert "--algo.gamma-beta-ratio" in capsys.readouterr().out


def test_every_command_says_what_its_evaluations_measure() -> None:
    assert FIGURES.keys() == OFFLINE.keys()
