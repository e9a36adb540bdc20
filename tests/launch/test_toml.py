"""Files: every layer in its place, every value's source kept, every fault pointed at; and back out again."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.launch.config import default_config
from hone.launch.errors import UsageError
from hone.launch.resolve import Resolved
from hone.launch.schema import replaced, settings, value_of
from hone.launch.toml import read, read_text, to_toml
from hone.launch.verbs import VERBS
from tests.launch.asking import only, resolved, settled

KNOWN = settings(default_config("ppo"))


def asked(tmp_path: Path, text: str | bytes, words: str = "", verb: str = "ppo") -> Resolved:
    path = tmp_path / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return resolved(f"{verb} --config {path} {words}")


def test_defaults_below_recipe_below_file_below_flags(tmp_path: Path) -> None:
    text = "[rollout]\nbatch_size = 16\nn-samples-per-prompt = 4\n"
    answer = asked(tmp_path, text, "--rollout.n-samples-per-prompt 2")
    assert (answer.config.train.seed, answer.sources["train.seed"]) == (42, "default")
    assert (answer.config.train.batch_size, answer.sources["train.batch_size"]) == (256, "recipe laptop")
    assert (answer.config.rollout.batch_size, answer.sources["rollout.batch_size"]) == (16, f"{tmp_path}/run.toml:2")
    assert (answer.config.rollout.n_samples_per_prompt, answer.sources["rollout.n_samples_per_prompt"]) == (
        2,
        "flag --rollout.n-samples-per-prompt",
    )


def test_the_local_backend_implies_one_unsharded_process_unless_told_otherwise(tmp_path: Path) -> None:
    assert settled("ppo --run.backend local").sources["ds.zero_stage"] == "run.backend local"
    assert settled("ppo --run.backend local").config.ds.zero_stage == 0
    assert asked(tmp_path, "[ds]\nzero_stage = 1", "--run.backend local").config.ds.zero_stage == 1


def test_roles_of_one_group_follow_the_size_that_was_given() -> None:
    answer = settled("ppo --actor.num-gpus-per-node 2 --placement.reference apart")
    assert (answer.config.critic.num_gpus_per_node, answer.config.ref.num_gpus_per_node) == (2, 1)
    assert answer.sources["critic.num_gpus_per_node"] == "as actor.num_gpus_per_node, in one group"


def test_openrlhf_names_are_translated_in_a_file_too(tmp_path: Path) -> None:
    algo = asked(tmp_path, "[actor]\neps_clip_low_high = [0.1, 0.3]\nentropy_coef = 0.5").config.algo
    assert (algo.clip.low, algo.clip.high, algo.entropy_coef) == (0.1, 0.3, 0.5)


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf[train]\r\nseed = 7\r\n", b"train.seed = 7", b'["train"]\nseed = 7', b"train = {seed = 7}"])
def test_marks_line_ends_and_every_way_to_write_a_table_are_accepted(tmp_path: Path, text: bytes) -> None:
    answer = asked(tmp_path, text)
    assert answer.problems == ()
    assert answer.config.train.seed == 7


@pytest.mark.parametrize(
    ("text", "where", "what", "mend"),
    [
        # spec C.3 row 14
        ("[rollout]\nbatch_sise = 3\n", ":2", "unknown key rollout.batch_sise", "did you mean rollout.batch_size?"),
        ("\n\nrolout.batch_size = 3\n", ":3", "unknown key rolout.batch_size", "rollout.batch_size"),
        ("[actor]\nlr = 3\n", ":2", "actor.lr has another name here", "use actor.adam.lr"),
        ("[algo.advantage]\nestimator = 'rloo'\n", ":2", "algo.advantage.estimator has another name", "`launch rloo`"),
        (
            "[algo.advantage]\nis_correction_type = 'icepop'\n",
            ":2",
            "another name",
            "algo.correction.level token algo.correction.mode mask",
        ),
        ("pretrain = 'x'\n", ":1", "pretrain has another name", "use actor.model_name_or_path"),
        ("[train]\nbatch_size = 'abc'\n", ":2", "train.batch_size: expected int, got `'abc'`", "the default is 128"),
        ("[train]\nbatch_size = -3\n", ":2", "-3 is out of range; it must be at least 1", ""),
        ("[train]\nbatch_size = 2020-01-01\n", ":2", "expected int", ""),
        ("[algo]\nkl = 3\n", ":2", "unknown key algo.kl", ""),
        ("recipe = 'desktop'\n", ":1", "there is no recipe desktop", "none, laptop"),
        ("verb = 'grpo'\n", ":1", "this file is for `launch grpo`", "launch grpo --config"),
    ],
)
def test_a_fault_in_a_file_is_pointed_at(tmp_path: Path, text: str, where: str, what: str, mend: str) -> None:
    problem = only(list(asked(tmp_path, text).problems))
    assert what in problem.what
    assert mend in problem.mend
    assert problem.where == f"{tmp_path}/run.toml{where}"


@pytest.mark.parametrize(
    ("text", "where", "caret"),
    [
        # row 12
        ("[rollout]\nbatch_size = \n", ":2:14", "batch_size = \n             ^"),
        ("[rollout\n", ":1:9", "[rollout\n        ^"),
        ("a = 1\na = 2\n", ":2:6", "a = 2\n     ^"),
        ('x = "abc', ":1:9", 'x = "abc\n        ^'),
    ],
)
def test_a_syntax_error_has_line_column_and_caret(tmp_path: Path, text: str, where: str, caret: str) -> None:
    problem = only(list(asked(tmp_path, text).problems))
    assert problem.where == f"{tmp_path}/run.toml{where}"
    assert problem.what.endswith(caret)


def test_a_file_that_is_not_there_names_its_nearest_neighbour(tmp_path: Path) -> None:
    # row 11
    (tmp_path / "run.toml").write_text("")
    problem = only(list(resolved(f"ppo --config {tmp_path}/rum.toml").problems))
    assert problem.what == f"there is no file {tmp_path}/rum.toml"
    assert problem.mend == f"did you mean {tmp_path}/run.toml? (looked in {tmp_path})"
    problem = only(list(resolved(f"ppo --config {tmp_path}/gone/deep/rum.toml").problems))
    assert problem.mend == f"nothing in {tmp_path} is called anything like `gone`"


def test_a_directory_names_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("")
    problem = only(list(resolved(f"ppo --config {tmp_path}").problems))
    assert (problem.what, problem.mend) == (f"{tmp_path} is a directory", "name a file in it: a.toml")


def test_other_encodings_and_other_formats_are_named(tmp_path: Path) -> None:
    problem = only(list(asked(tmp_path, b"[train]\n# caf\xe9\n").problems))
    assert "not UTF-8: byte 14 is 0xe9" in problem.what
    yaml = tmp_path / "run.yaml"
    yaml.write_text("train:\n  seed: 3\n")
    problem = only(list(resolved(f"ppo --config {yaml}").problems))
    assert (problem.where, problem.mend) == (f"{yaml}:1:6", "configuration files are TOML")


def test_nothing_in_a_file_is_evaluated(tmp_path: Path) -> None:
    # spec S11
    text = "[data]\ninput_key = '${HOME}'\nlabel_key = '$(id)'\ninput_template = '{0.__class__} {}'\n"
    data = asked(tmp_path, text).config.data
    assert (data.input_key, data.label_key, data.input_template) == ("${HOME}", "$(id)", "{0.__class__} {}")


@pytest.mark.parametrize(
    "line",
    [
        *VERBS,
        "ppo --recipe none --algo.value-clip none --train.max-steps 3 --actor.adam.betas 0.1 0.2",
        "dr_grpo --algo.reduction.over token",  # which unsets a length that is set by default
        "gspo --algo.correction.level geometric --algo.clip.dual 3 --algo.correction.left-behind 0.5",
    ],
)
def test_a_written_configuration_reads_back_the_same(tmp_path: Path, line: str) -> None:
    before = settled(line)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(before.config, before.sources))
    after = settled(f"{line.split()[0]} --config {path}")
    assert after.config == before.config
    assert after.recipe == "none"


@given(
    text=st.text(st.characters(codec="utf-8"), max_size=40),
    lr=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32 - 1),
    steps=st.none() | st.integers(1, 10**9),
    enabled=st.booleans(),
)
def test_whatever_a_value_is_it_survives_the_file(text: str, lr: float, seed: int, steps: int | None, enabled: bool) -> None:
    values = {"data.input_key": text, "actor.adam.lr": lr, "train.seed": seed, "train.max_steps": steps, "run.debug": enabled}
    config = replaced(default_config("ppo"), values)
    layer = read("run.toml", to_toml(config), KNOWN, {}, verb="ppo")
    assert layer.problems == []
    assert replaced(default_config("ppo"), layer.values) == config


def test_the_printed_configuration_tells_every_source(tmp_path: Path) -> None:
    answer = asked(tmp_path, "[rollout]\nbatch_size = 16\n", "--train.seed 3")
    lines = {line.partition(" ")[0]: line for line in to_toml(answer.config, answer.sources).splitlines()}
    assert lines["seed"].split("#") == ["seed = 3                                      ", " flag --train.seed"]
    assert lines["max_len"].endswith("# recipe laptop")
    assert lines["batch_size"].endswith("# recipe laptop")  # train's, the later one
    assert f"batch_size = 16                               # {tmp_path}/run.toml:2" in to_toml(answer.config, answer.sources)
    assert (
        len([line for line in to_toml(answer.config, answer.sources).splitlines() if " = " in line or "is not set" in line])
        == len(KNOWN) + 2
    )


def test_a_file_of_one_command_is_refused_by_another(tmp_path: Path) -> None:
    text = to_toml(settled("ppo").config)
    assert "this file is for `launch ppo`" in only(list(asked(tmp_path, text, verb="grpo").problems)).what


def test_reading_raises_for_a_path_that_cannot_be_one() -> None:
    with pytest.raises(UsageError, match="not a path"):
        read_text("a\0b")


def test_value_of_follows_dots() -> None:
    assert value_of(default_config("ppo"), "actor.adam.betas") == (0.9, 0.95)
