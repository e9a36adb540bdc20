"""What the settings point at: looked for, and named when it is not what it must be, before anything is started."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hone.datasets.tokenizer import VOCABULARY_FILES
from hone.launch import cli, preflight
from hone.launch.errors import Problem
from tests.launch.asking import missing, only, settled

REWARD = "def reward_func(queries, prompts, labels):\n    return {}\n"


def weights(size: int) -> bytes:
    """A safetensors file of so many bytes."""
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": "U8", "shape": [900], "data_offsets": [0, 900]}})
    padded = header.ljust(size - 900 - 8).encode()
    return len(padded).to_bytes(8, "little") + padded + bytes(900)


def a_model(path: Path, **config: object) -> Path:
    """The files of a model directory, as far as they are looked at: nothing loads them."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096} | config))
    (path / "model.safetensors").write_bytes(weights(1020))
    (path / "tokenizer.json").write_text("{}")
    return path


def of_model(model: Path | str, words: str = "") -> list[Problem]:
    return missing(f"ppo --actor.model-name-or-path {model} {words}")


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_built_in_run_lacks_nothing() -> None:
    assert missing("ppo") == []
    assert missing("grpo") == []


def test_a_whole_model_directory_is_accepted(tmp_path: Path) -> None:
    assert of_model(a_model(tmp_path / "m")) == []
    assert of_model(a_model(tmp_path / "relative") and "relative") == []


def test_key_heads_that_a_head_stride_does_not_divide_are_told(tmp_path: Path) -> None:
    model, ring = a_model(tmp_path / "m", num_key_value_heads=4), "--actor.num-gpus-per-node 2 --ds.ring-attn-size 2"
    assert of_model(model, f"{ring} --ds.ring-attn-head-stride 2") == []
    problem = only(of_model(model, f"{ring} --ds.ring-attn-head-stride 3"))
    assert problem.what.startswith("--ds.ring-attn-head-stride 3 does not divide the 4 key heads of ")
    assert (problem.mend, problem.code) == ("choose a divisor of 4", 2)


def test_heads_that_a_model_over_ranks_does_not_divide_are_told(tmp_path: Path) -> None:
    model = a_model(tmp_path / "m", num_attention_heads=8, num_key_value_heads=2)
    assert of_model(model, "--actor.num-gpus-per-node 2 --ds.tensor-parallel-size 2") == []
    problem = only(of_model(model, "--actor.num-gpus-per-node 4 --ds.tensor-parallel-size 4"))
    assert problem.what.startswith("--ds.tensor-parallel-size 4 does not divide the 2 key heads of ")
    assert (problem.mend, problem.code) == ("choose of [1, 2]", 2)
    problem = only(missing("grpo --actor.num-gpus-per-node 4 --ds.tensor-parallel-size 4"))
    assert problem.what == "ds.tensor_parallel_size 4 does not divide the built-in model's 2 key heads"


def test_a_hub_id_is_left_to_the_loader(tmp_path: Path) -> None:
    assert of_model("Qwen/Qwen3-0.6B") == []
    a_model(tmp_path / "models" / "tiny")
    problem = only(of_model("models/tinny"))
    assert "there is no model directory `models/tinny`" in problem.what
    assert "did you mean models/tiny?" in problem.mend
    problem = only(of_model("modls"))
    assert "did you mean models?" in problem.mend


def test_each_model_is_looked_at_once_and_under_its_own_name(tmp_path: Path) -> None:
    good, gone = a_model(tmp_path / "good"), tmp_path / "gone"
    words = f"--critic.model-name-or-path {gone} --ref.model-name-or-path {gone}"
    assert only(of_model(good, words)).where == f"--critic.model-name-or-path {gone}"


@pytest.mark.parametrize(
    ("fault", "what", "code"),
    [
        ("no config", "has no config.json", 5),
        ("broken config", "not valid JSON", 5),
        ("listed config", "is not a JSON object", 5),
        ("no weights", "has a config.json but no *.safetensors", 5),
        ("cut weights", "model.safetensors is cut off: it has 1019 of the 1020 bytes that its header speaks of", 5),
        ("cut header", "model.safetensors is cut off within its header: it has 60 bytes", 5),
        ("empty weights", "model.safetensors is cut off within its header: it has 0 bytes", 5),
        ("long weights", "model.safetensors has 1021 bytes, more than the 1020 that its header speaks of", 5),
        ("no safetensors", "model.safetensors is no safetensors file: it does not begin with the length of a header", 5),
        ("strange header", "model.safetensors is no safetensors file: its header does not list tensors", 5),
        ("lost link", "model.safetensors cannot be read: No such file or directory", 5),
        ("half a tokenizer", "has no tokenizer", 5),
        ("pickled", "holds its weights as pickle (pytorch_model.bin)", 5),  # spec C.3 row 55
        ("no tokenizer", "has no tokenizer", 5),
        ("own code", "needs code of its own (auto_map in config.json)", 5),  # row 56
        ("own tokenizer", "needs code of its own (auto_map in tokenizer_config.json)", 5),
        ("lost shard", "lacks 1 of its 2 weight files: model-2.safetensors", 5),
        (
            "short context",
            "data.max_len 512 is more than the model's 64 positions (max_position_embeddings in its config.json)",
            2,
        ),  # row 21
        ("a file", "is a file", 5),
        ("absent", "no model directory", 5),
    ],
)
def test_a_faulty_model_directory_says_what_is_wrong(tmp_path: Path, fault: str, what: str, code: int) -> None:
    model = a_model(tmp_path / "m", max_position_embeddings=64 if fault == "short context" else 4096)
    if fault == "no config":
        (model / "config.json").unlink()
    if fault == "broken config":
        (model / "config.json").write_text("{")
    if fault == "listed config":
        (model / "config.json").write_text("[]")
    if fault in ("no weights", "pickled"):
        (model / "model.safetensors").unlink()
    if fault == "pickled":
        (model / "pytorch_model.bin").write_bytes(b"x")
    file = model / "model.safetensors"
    if fault == "cut weights":
        file.write_bytes(weights(1020)[:-1])
    if fault == "cut header":
        file.write_bytes(weights(1020)[:60])
    if fault == "empty weights":
        file.write_bytes(b"")
    if fault == "long weights":
        file.write_bytes(weights(1020) + b"x")
    if fault == "no safetensors":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    if fault == "strange header":
        file.write_bytes((9).to_bytes(8, "little") + b'{"w": {}}')
    if fault == "lost link":
        file.unlink()
        file.symlink_to(tmp_path / "gone")
    if fault in ("no tokenizer", "half a tokenizer"):
        (model / "tokenizer.json").unlink()
    if fault == "half a tokenizer":  # its loader would refuse it too, but later and with another exit code
        (model / "tokenizer_config.json").write_text("{}")
    if fault == "own code":
        (model / "config.json").write_text(json.dumps({"model_type": "mystery", "auto_map": {"AutoModelForCausalLM": "mystery.Mystery"}}))
    if fault == "own tokenizer":
        (model / "config.json").write_text(json.dumps({"model_type": "mystery"}))
        (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tok.Tok", None]}}))
    if fault == "lost shard":
        shards = {"a": "model.safetensors", "b": "model-2.safetensors"}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    if fault in ("a file", "absent"):
        shutil.rmtree(model)
    if fault == "a file":
        model.write_text("")
    problem = only(of_model(model))
    assert what in problem.what
    assert problem.mend
    assert problem.code == code
    assert problem.where == f"--actor.model-name-or-path {model}"


@pytest.mark.parametrize("pattern", VOCABULARY_FILES)
def test_every_vocabulary_that_can_be_loaded_is_a_tokenizer(tmp_path: Path, pattern: str) -> None:
    model = a_model(tmp_path / "m")
    (model / "tokenizer.json").rename(model / pattern.replace("*", "vocab"))
    assert of_model(model) == []


def test_code_beside_an_architecture_that_transformers_has_is_never_needed(tmp_path: Path) -> None:
    assert of_model(a_model(tmp_path / "m", model_type="phi3", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})) == []


def test_prompts_that_are_not_there_are_named_with_their_neighbour(tmp_path: Path) -> None:
    # row 29
    (tmp_path / "train.jsonl").write_text('{"input": "1+1"}')
    model, reward = a_model(tmp_path / "m"), tmp_path / "reward.py"
    reward.write_text(REWARD)
    words = f"--reward.remote-url {reward} --data.prompt-dataset {tmp_path}"
    problem = only(of_model(model, f"{words}/trian.jsonl"))
    assert "does not exist: there is no 'trian.jsonl'" in problem.what
    assert problem.mend.startswith("did you mean 'train.jsonl'?")
    assert (problem.code, problem.where) == (3, f"--data.prompt-dataset {tmp_path}/trian.jsonl")
    (tmp_path / "empty").mkdir()
    problem = only(of_model(model, f"{words}/empty"))
    assert "is a directory without data files" in problem.what
    assert problem.mend == "it is empty; name a data file"
    assert of_model(model, words) == []  # a folder with a data file of that split
    assert of_model(model, f"{words}/train.jsonl") == []


def test_faulty_rows_are_found_beside_everything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = a_model(tmp_path / "m"), tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1"}\n{"question": ""}\n{"question": "2+2"\n')
    words = f"ppo --actor.model-name-or-path {model} --data.prompt-dataset {rows}"
    problems = missing(f"{words} --data.input-key question --reward.remote-url gone.py")
    assert [problem.code for problem in problems] == [3, 6]
    assert "2 of 3 rows cannot be used" in problems[0].what
    assert "rows.jsonl:2" in problems[0].what and "rows.jsonl:3" in problems[0].what
    assert problems[0].where == f"--data.prompt-dataset {rows}, --data.input-key question"
    # a column whose name was refused is not looked for
    assert missing(f"{words} --data.input-key") == []
    assert "does not exist" in only(missing(f"{words}s --data.input-key")).what

    (tmp_path / "reward.py").write_text(REWARD)
    assert cli.main([*words.split(), "--reward.remote-url", "reward.py", "--print-config"]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "name one with --data.input-key; did you mean 'question'?" in printed.err


def test_what_is_not_there_is_told_apart_from_how_to_mend_it() -> None:
    problems = missing("ppo --actor.model-name-or-path ./nope --data.prompt-dataset far/rows.jsonl --reward.remote-url r.py")
    assert [problem.code for problem in problems] == [5, 3, 6]
    model, prompts, reward = problems
    assert model.what.startswith("no model directory ./nope")
    assert model.mend.startswith("name the directory that holds config.json")
    assert prompts.mend == "--data.prompt-dataset FILE.jsonl, one JSON object per line"
    assert reward.what.endswith("r.py does not exist")
    assert reward.mend == "give the path of a file with def reward_func(queries, prompts, labels)"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (None, "does not exist"),
        ("def reward_func(:\n", "reward.py:1 has a syntax error"),
        ("def judge(queries, prompts, labels): ...\n", "reward_func"),
        ("def reward_func(queries): ...\n", "reward.py:1"),
        ("async def reward_func(queries): ...\n", "reward.py:1"),
        ("def reward_func(**columns): ...\n", "fits more than one form"),
    ],
)
def test_a_reward_file_is_judged_by_its_source(tmp_path: Path, source: str | None, what: str) -> None:
    # row 49
    if source is not None:
        (tmp_path / "reward.py").write_text(source)
    problem = only(missing(f"ppo --reward.remote-url {tmp_path}/reward.py"))
    assert what in problem.what
    assert problem.mend
    assert problem.code == 6


def test_a_reward_url_is_refused_without_repeating_what_may_be_secret() -> None:
    problem = only(missing("ppo --reward.remote-url http://me:sekret@host/reward"))
    assert "holds a user or password" in problem.what
    assert (problem.code, problem.where) == (6, "--reward.remote-url")
    assert "sekret" not in str(problem)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--reward.remote-url ftp://host/x", "scheme 'ftp'"),
        ("--reward.remote-url http://169.254.169.254/x", "link-local"),
        ("--reward.remote-url http://host/x --reward.allowed-hosts other", "does not name"),
        ("--reward.remote-url builtin:poetry", "no built-in reward 'poetry'"),
        ("--reward.remote-url builtin:gsm8k,builtin:math --reward.weights 1", "1 weights for 2 rewards"),
        ("--reward.remote-url builtin:gsm8k --reward.weights much", "are not numbers"),
    ],
)
def test_rewards_are_judged_by_their_names(words: str, what: str) -> None:
    problem = only(missing(f"ppo {words}"))
    assert what in problem.what
    assert problem.mend
    assert problem.code == 6


@pytest.mark.parametrize(
    ("name", "what"),
    [
        # row 25
        ("", "it is empty"),
        ("../x", "it contains `..`"),
        ("runs/../../x", "it contains `..`"),
        ("x" * 300, "longer than 200 bytes"),
        ("runs/a\u202eb", "cannot be printed"),
        ("runs/a\x1b[31m", "cannot be printed"),
        ("runs/*", "letters, digits"),
    ],
)
def test_a_run_directory_has_a_plain_name(name: str, what: str) -> None:
    problem = only(missing(f"ppo --run.dir={name}"))
    assert what in problem.what
    assert problem.code == 2


@pytest.mark.parametrize("name", ["runs/first", "new.run-2", "deep/er/run", "caf\u00e9"])
def test_a_new_run_directory_may_have_any_such_name(name: str) -> None:
    assert missing(f"ppo --run.dir {name}") == []


def test_a_run_directory_is_new_or_empty(tmp_path: Path) -> None:
    home = tmp_path / "run"
    home.mkdir()
    assert missing(f"ppo --run.dir {home}") == []
    (home / "metrics.jsonl").write_text("")
    assert "holds a run already (metrics.jsonl)" in only(missing(f"ppo --run.dir {home}")).what
    (home / "metrics.jsonl").rename(home / "notes.txt")
    assert "is not empty (notes.txt)" in only(missing(f"ppo --run.dir {home}")).what
    assert "is not a directory" in missing(f"ppo --run.dir {home}/notes.txt")[0].what


def test_a_place_that_cannot_be_written_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # row 26; the tests may run as root, for whom nothing is unwritable
    monkeypatch.setattr(preflight.os, "access", lambda *_: False)
    problem = only(missing(f"ppo --run.dir {tmp_path}/run"))
    assert (problem.what, problem.code) == (f"nothing can be written in {tmp_path}", 5)


def test_too_little_disk_is_told_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**27))
    problems = missing("ppo")
    assert problems[0].what == f"the run needs about 0.2 GiB of disk, {tmp_path} has 0.1 GiB free"
    assert problems[0].code == 5


@pytest.mark.parametrize(
    ("words", "exports", "checkpoints"),
    [
        # 900 numbers in fp32; 40 steps of the recipe
        ("ppo", 3600, 0),
        ("ppo --ds.param-dtype bf16", 1800, 0),
        # actor and critic, master and two moments each: 2 x 900 x 12 bytes, three kept and one being written
        ("ppo --ckpt.save-steps 10", 3600, 4 * 21600),
        ("ppo --ckpt.save-steps 1 --ckpt.max-num 1", 3600, 2 * 21600),
        ("ppo --ckpt.save-steps 20", 3600, 2 * 21600),
        ("grpo --ckpt.save-steps 10", 3600, 4 * 10800),
        # the model at the end, and with each of four checkpoints
        ("grpo --ckpt.save-steps 10 --ckpt.save-hf", 5 * 3600, 4 * 10800),
        ("grpo --ckpt.save-hf", 3600, 0),
    ],
)
def test_disk_is_counted_by_what_lies_there_at_a_time(tmp_path: Path, words: str, exports: int, checkpoints: int) -> None:
    verb, _, rest = words.partition(" ")
    config = settled(f"{verb} --actor.model-name-or-path {a_model(tmp_path / 'm')} {rest}").config
    assert (preflight.export_bytes(config), preflight.checkpoint_bytes(config)) == (exports, checkpoints)


def test_checkpoints_elsewhere_need_room_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model(tmp_path / "m")
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr(preflight, "STATE_BYTES", 2**20)
    monkeypatch.setattr(preflight, "_device", lambda place: 1 + (place == there))
    free = SimpleNamespace(free=2**30)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: free)
    words = "--ckpt.save-steps 10 --ckpt.path there/deep --run.backend local"
    problem = only(of_model(model, words))
    assert problem.what == f"checkpoints need about 7.0 GiB of disk, {there} has 1.0 GiB free"
    assert (problem.code, "--ckpt.path" in problem.mend) == (5, True)
    monkeypatch.setattr(preflight, "_device", lambda _: 1)
    assert (
        only(of_model(model, words)).what
        == f"the run needs about 7.3 GiB of disk (0.0 of models, 7.0 of checkpoints), {tmp_path} has 1.0 GiB free"
    )


def test_a_model_at_home_is_weighed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_model(tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert preflight.weight_bytes(settled("ppo --actor.model-name-or-path ~/m").config) == 1020


def test_shared_memory_must_hold_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model(tmp_path / "m")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=2039 if str(place) == "/dev/shm" else 2**40))
    assert "through /dev/shm" in only(of_model(model)).what
    assert of_model(model, "--run.backend local") == []


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # row 60
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    problem = only(missing("ppo"))
    assert (problem.what, problem.code) == ("vllm is not installed", 5)
    assert missing("ppo --run.backend local") == []


def test_the_cpu_build_of_vllm_is_not_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.metadata, "distributions", lambda name: [name])
    problem = only(missing("ppo", gpus=2))
    assert problem.what == "2 GPUs are visible, but the installed vLLM is the CPU build"
    assert "`uv run --no-group cpu --group cuda launch ...`" in problem.mend  # a plain `uv run` would undo a `uv sync`
    assert missing("ppo", gpus=0) == []


def test_the_built_in_model_has_a_context_too() -> None:
    problem = only(missing("ppo --data.max-len 1024"))
    assert problem.what == "data.max_len 1024 is more than the built-in model's 512 positions"
