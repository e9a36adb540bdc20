"""Whole runs in this process: what is written, what rises, what a user's own model, prompts and reward meet."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hone.launch.cli import main
from hone.launch.observe.ledger import replay
from hone.launch.observe.metrics import check_names
from hone.launch.observe.run_directory import read_events, read_metrics
from tests.launch.conftest import GSM8K, MADE_UP, SHORT_IS_GOOD, save_model, write_reward, write_rows

SMALL = ["--run.backend", "local", "--rollout.batch-size", "4", "--rollout.n-samples-per-prompt", "2", "--train.batch-size", "8"]


def own(model: Path, prompts: Path, reward: Path | str, run: Path, *more: str) -> list[str]:
    parts = ["--actor.model-name-or-path", str(model), "--data.prompt-dataset", str(prompts), "--reward.remote-url", str(reward)]
    keys = ["--data.input-key", "question", "--data.label-key", "answer", "--data.max-len", "512", "--rollout.max-new-tokens", "12"]
    return [*SMALL, *parts, *keys, "--train.max-steps", "2", "--run.dir", str(run), *more]


@pytest.mark.parametrize("verb", ["ppo", "grpo"])
def test_the_builtin_model_learns_and_the_run_directory_tells_everything(verb: str, hone_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([verb, "--run.backend", "local", "--run.dir", str(run), "--train.max-steps", "12", "--train.seed", "0"]) == 0

    steps, torn = read_metrics(run)
    assert torn == 0 and [step["step"] for step in steps] == list(range(1, 13))
    for step in steps:
        check_names(step)
        assert step["mismatch/logp_abs_diff_mean"] <= 1e-4 and step["sync/canary_abs_diff_max"] <= 1e-3
        assert step["staleness/version_lag_max"] == 0 and step["train/optimizer_steps"] == 1
    # One optimiser step per rollout: the policy that learns is the one that sampled, so nothing can be clipped.
    assert all(step["train/ppo_clip_ratio"] == 0 for step in steps)
    assert ("train/critic_loss" in steps[0]) == (verb == "ppo")
    rewards = [step["rollout/reward_mean"] for step in steps]
    assert sum(rewards[:2]) / 2 < 0.5 and sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.2

    totals = replay(read_events(run)[0]).verify()
    assert (totals.issued, totals.trained, totals.open) == (12 * 32, 12 * 32, 0)
    rollouts = pyarrow.parquet.read_table(run / "rollouts" / "step_000003.parquet").to_pylist()
    assert len(rollouts) == 256 and len({row["seed"] for row in rollouts}) == 256
    assert {row["version"] for row in rollouts} == {2}
    assert all(len(row["tokens"]) == len(row["rollout_logp"]) for row in rollouts)
    assert json.loads((run / "manifest.json").read_text())["seed"] == 0
    assert (run / "report.md").read_text().startswith(f"# hone {verb}: finished")

    # The saved model is the one that learnt: asked greedily it answers right where the untrained one gives a wrong sign.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    asked = tokenizer(["3+4=", "7+1=", "2+6="], return_tensors="pt")["input_ids"]
    answered = model.generate(asked, max_new_tokens=1, do_sample=False)
    assert tokenizer.batch_decode(answered) == ["3+4=7", "7+1=8", "2+6=8"]


def test_sleeping_between_phases_changes_no_number_and_the_average_is_exported_beside_the_model(hone_cache: Path, tmp_path: Path) -> None:
    def run(name: str, *more: str) -> list[dict[str, float]]:
        arguments = ["--run.backend", "local", "--train.max-steps", "3", "--train.seed", "0", "--rollout.batch-size", "8"]
        samples = ["--rollout.n-samples-per-prompt", "2", "--train.batch-size", "8"]
        assert main(["ppo", *arguments, *samples, "--run.dir", str(tmp_path / name), *more]) == 0
        steps, _ = read_metrics(tmp_path / name)
        for step in steps:
            check_names(step)
        return [{key: value for key, value in step.items() if not key.startswith(("timing/", "perf/", "sync/"))} for step in steps]

    awake, asleep = run("awake"), run("asleep", "--ds.enable-sleep", "--train.enable-ema", "--train.ema-beta", "0.5")
    assert awake == asleep and all(step["train/actor_skipped"] == step["train/critic_skipped"] == 0 for step in asleep)
    models = {
        name: dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters())
        for name in ("awake/model", "asleep/model", "asleep/model_ema")
    }
    assert all(torch.equal(weight, models["asleep/model"][name]) for name, weight in models["awake/model"].items())
    assert any(not torch.equal(weight, models["asleep/model"][name]) for name, weight in models["asleep/model_ema"].items())
    assert not (tmp_path / "awake" / "model_ema").exists()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(hone_cache: Path, tmp_path: Path) -> None:
    def rewards(name: str, seed: str) -> list[float]:
        arguments = ["--run.backend", "local", "--train.max-steps", "2", "--train.seed", seed, "--run.dir", str(tmp_path / name)]
        assert main(["grpo", *arguments]) == 0
        return [step["train/policy_loss"] for step in read_metrics(tmp_path / name)[0]]

    first = rewards("first", "5")
    assert rewards("again", "5") == first != rewards("other", "6")


def test_a_saved_configuration_runs_again(hone_cache: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert main(["grpo", "--run.backend", "local", "--train.max-steps", "1", "--run.dir", str(first)]) == 0
    assert main(["grpo", "--config", str(first / "config.toml"), "--run.dir", str(again)]) == 0
    assert read_metrics(again)[0][0]["train/policy_loss"] == read_metrics(first)[0][0]["train/policy_loss"]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_users_own_model_prompts_and_reward(kind: str, tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer, kind=kind, tied=tied)
    reward = write_reward(tmp_path / "reward.py", SHORT_IS_GOOD)
    prompts = write_rows(tmp_path / "rows.jsonl", MADE_UP)
    assert main(["ppo", *own(model, prompts, reward, tmp_path / "run")]) == 0
    steps, _ = read_metrics(tmp_path / "run")
    assert len(steps) == 2 and all(step["mismatch/logp_abs_diff_mean"] <= 1e-4 for step in steps)
    assert steps[0]["rollout/score_mean"] == 0.5 and steps[0]["rollout/extra/characters"] > 0
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path / "run" / "model"))
    assert type(after) is type(before) and after.config.tie_word_embeddings is tied
    moved = [not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)


def test_chat_messages_are_rendered_with_the_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer, kind="qwen3", tied=True)
    reward = write_reward(tmp_path / "reward.py", SHORT_IS_GOOD)
    rows = [{"question": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in MADE_UP]
    prompts = write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["grpo", *own(model, prompts, reward, tmp_path / "run", "--data.apply-chat-template")]) == 0
    row = pyarrow.parquet.read_table(tmp_path / "run" / "rollouts" / "step_000001.parquet").to_pylist()[0]
    assert row["prompt"].startswith("<|im_start|>user\nHow many legs") and row["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K problems do not lie beside this checkout (../shared/data/gsm8k)")
def test_real_word_problems(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer, kind="llama", tied=False)
    reward = write_reward(tmp_path / "reward.py", 'return {"rewards": [float(labels[0].split("####")[1].strip() in queries[0])]}')
    arguments = own(model, GSM8K, reward, tmp_path / "run", "--data.max-samples", "200", "--data.max-len", "800")
    assert main(["grpo", *arguments]) == 0
    assert len(read_metrics(tmp_path / "run")[0]) == 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no such unit')", "no such unit"),
        ("return None", "None"),
        ("return {'rewards': [float('nan')]}", "nan"),
        ("return {'rewards': ['good']}", "good"),
        ("return {'rewards': [1.0, 2.0]}", "2"),
        ("import time; time.sleep(60)", "1 s"),
    ],
)
def test_a_reward_that_is_none_stops_the_run_with_its_name_and_prompt(
    body: str, said: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", tokenizer, kind="llama", tied=True)
    prompts = write_rows(tmp_path / "rows.jsonl", MADE_UP)
    # It judges the smoke rows, and fails when the policy answers.
    late = f"if queries[0] != prompts[0] + '0': {body}\nreturn {{'rewards': [1.0]}}"
    reward = write_reward(tmp_path / "reward.py", late)
    assert main(["grpo", *own(model, prompts, reward, tmp_path / "run", "--reward.timeout-s", "1")]) == 6
    error = capsys.readouterr().err
    assert "reward_func" in error and "reward.py" in error and said in error and "smoke" not in error
    issued = next(event for event in read_events(tmp_path / "run")[0] if event["kind"] == "issued")["prompts"]
    assert any(prompt_id in error for prompt_id in issued)
    assert "failed" in (tmp_path / "run" / "report.md").read_text().splitlines()[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_reward_of_the_wrong_shape_ends_the_run_before_any_engine_starts(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(plan: object) -> None:
        raise AssertionError("the parts were built")

    monkeypatch.setattr("hone.launch.local.build", built)
    model = save_model(tmp_path / "model", tokenizer, kind="llama", tied=True)
    prompts = write_rows(tmp_path / "rows.jsonl", MADE_UP)
    reward = write_reward(tmp_path / "reward.py", "return {'rewards': [[1.0, 2.0]]}")
    assert main(["grpo", *own(model, prompts, reward, tmp_path / "run")]) == 6
    assert "the reward failed on the smoke rows at the start: reward function reward_func" in capsys.readouterr().err
    assert [event for event in read_events(tmp_path / "run")[0] if event["kind"] == "issued"] == []


class RewardServer(BaseHTTPRequestHandler):
    """OpenRLHF's contract at /get_reward, and nothing elsewhere."""

    def do_POST(self) -> None:
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = self.path == "/get_reward"
        content = json.dumps({"rewards": [1.0 / (1 + len(query)) for query in rows["query"]]}).encode() if found else b"no such page"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


def test_a_reward_server_judges_a_run_and_a_wrong_path_ends_it_at_the_start(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", tokenizer, kind="llama", tied=True)
    prompts = write_rows(tmp_path / "rows.jsonl", MADE_UP)
    with ThreadingHTTPServer(("127.0.0.1", 0), RewardServer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert main(["grpo", *own(model, prompts, f"{url}/get_reward", tmp_path / "run")]) == 0
        assert 0 < read_metrics(tmp_path / "run")[0][0]["rollout/reward_mean"] < 1
        capsys.readouterr()
        assert main(["grpo", *own(model, prompts, f"{url}/reward", tmp_path / "other")]) == 6
        server.shutdown()
    error = capsys.readouterr().err
    assert "failed on the smoke rows at the start" in error and "answered 404 (no such page)" in error
    assert [event for event in read_events(tmp_path / "other")[0] if event["kind"] == "issued"] == []


def test_dynamic_sampling_trains_on_groups_that_differ_and_accounts_for_the_others(hone_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["dapo", *SMALL, "--rollout.dynamic-filtering", "range", "--train.max-steps", "4", "--run.dir", str(run)]
    assert main(arguments) == 0
    steps, _ = read_metrics(run)
    events = read_events(run)[0]
    totals = replay(events).verify()
    assert totals.trained == 4 * len(steps) and totals.open == 0
    assert totals.dropped > 0 and all(reason.startswith("filtered: mean score ") for reason in totals.reasons)
    # Of two samples each kept group has one right and one wrong, so the steps' mean is one half; the policy's own is not.
    assert all(step["rollout/reward_mean"] == 0.5 for step in steps)
    dropped = {number: sum(event["step"] == number for event in events if event["kind"] == "dropped") for number in range(1, 5)}
    for step in steps:
        check_names(step)
        assert step["rollout/filtering_pass_rate"] == pytest.approx(4 / (4 + dropped[step["step"]]))
    assert any(step["rollout/filtering_reward_mean"] != 0.5 for step in steps)


def test_dynamic_sampling_of_a_reward_that_tells_nothing_apart_ends_the_run(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, prompts = save_model(tmp_path / "model", tokenizer, kind="llama", tied=True), write_rows(tmp_path / "rows.jsonl", MADE_UP * 20)
    reward = write_reward(tmp_path / "reward.py", "return {'rewards': [1.0] * len(queries)}")
    more = ["--rollout.dynamic-filtering", "variance", "--rollout.dynamic-filtering-batches", "2"]
    assert main(["grpo", *own(model, prompts, reward, tmp_path / "run", *more)]) == 6
    assert "not one of 8 prompts in step 1 had a group worth training on" in capsys.readouterr().err
    totals = replay(read_events(tmp_path / "run")[0]).verify()
    assert totals.trained == 0 and totals.dropped == 8 and totals.open == 0


def test_when_dynamic_sampling_has_used_up_the_data_the_run_is_finished(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, prompts = save_model(tmp_path / "model", tokenizer, kind="llama", tied=True), write_rows(tmp_path / "rows.jsonl", MADE_UP)
    reward = write_reward(tmp_path / "reward.py", "return {'rewards': [1.0] * len(queries)}")
    more = ["--rollout.dynamic-filtering", "variance", "--rollout.dynamic-filtering-batches", "1000", "--train.num-episodes", "2"]
    assert main(["grpo", *own(model, prompts, reward, tmp_path / "run", *more)]) == 0
    totals = replay(read_events(tmp_path / "run")[0]).verify()
    assert totals.trained == 0 and totals.dropped == totals.issued == 2 * len(MADE_UP)
