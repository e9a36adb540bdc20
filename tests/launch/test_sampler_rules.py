"""How responses are drawn: what training takes, what only generate and eval do, and what neither can read."""

import json
from pathlib import Path

import pytest

from hone.launch.cli import main
from hone.launch.errors import Problem
from hone.launch.resolve import resolve
from hone.launch.rules import broken
from hone.launch.schema import replaced, value_of
from hone.launch.using_rules import broken as broken_using
from hone.rollout.sampling import sampler_of
from tests.launch.asking import crossed, only, settled

RESHAPING = [
    ("--rollout.top-p 0.9", "rollout.top_p 0.9"),
    ("--rollout.top-k 20", "rollout.top_k 20"),
    ("--rollout.min-p 0.05", "rollout.min_p 0.05"),
    ("--rollout.min-new-tokens 4", "rollout.min_new_tokens 4"),
    ("--rollout.repetition-penalty 1.1", "rollout.repetition_penalty 1.1"),
    ("--rollout.presence-penalty=-0.5", "rollout.presence_penalty -0.5"),
    ("--rollout.frequency-penalty 0.5", "rollout.frequency_penalty 0.5"),
    ("--rollout.structured-outputs.regex a+", "rollout.structured_outputs.regex"),
    ("--rollout.structured-outputs.json-object", "rollout.structured_outputs.json_object"),
]
"""What makes the distribution sampled from another than the learner's, and how it is told."""


def using(line: str) -> list[Problem]:
    """Problems between the settings of a command that trains nothing."""
    verb, *argv = line.split()
    return list(broken_using(resolve(verb, argv, gpus=0), 0))


@pytest.mark.parametrize(("flags", "told"), RESHAPING)
def test_training_refuses_what_the_learner_cannot_recompute_and_using_takes_it(flags: str, told: str) -> None:
    for line in (f"grpo {flags}", f"grpo {flags} --algo.correction.level token", f"ppo {flags}"):
        problem = only(crossed(line))
        assert told in problem.what and "another distribution than the one the learner knows" in problem.what
        assert "`launch generate` and `launch eval` take it" in problem.mend
        assert flags.partition("=")[0].partition(" ")[0] in problem.where
    assert not using(f"generate {flags} --run.backend vllm") and not using(f"eval {flags} --run.backend vllm")


def test_training_names_everything_it_refuses_at_once() -> None:
    problem = only(crossed('grpo --rollout.top-p 0.9 --rollout.min-new-tokens 2 --rollout.structured-outputs.choice ["a"]'))
    assert problem.what.startswith("rollout.top_p 0.9, rollout.min_new_tokens 2, rollout.structured_outputs.choice: ")


def test_training_takes_texts_and_ids_that_end_a_response() -> None:
    resolved = settled("grpo --rollout.stop END --rollout.stop-token-ids 5,7")
    assert not list(broken(resolved, 0))
    assert sampler_of(resolved.config.rollout)["stop"] == ("END",)
    assert sampler_of(resolved.config.rollout)["stop_token_ids"] == (5, 7)


@pytest.mark.parametrize(
    ("flags", "what", "mend"),
    [
        ("--rollout.stop [1]", "'[1]' is no list of texts", "a JSON list of texts that are not empty"),
        ("--rollout.stop-token-ids 5,x", "'5,x' is no list of token ids", "whole numbers, separated by commas"),
        ("--rollout.min-new-tokens 9 --rollout.max-new-tokens 8", "9 tokens at least and 8 at most", "--rollout.min-new-tokens 8 or less"),
        ("--rollout.structured-outputs.json {a", "neither a JSON object nor a file with one", "write a JSON schema"),
        ("--rollout.structured-outputs.choice yes", "'yes' is no JSON list of texts", '["yes", "no"]'),
        (
            "--rollout.structured-outputs.regex a --rollout.structured-outputs.json-object",
            "structured_outputs.json_object and structured_outputs.regex are two grammars",
            "one of them",
        ),
    ],
)
def test_what_cannot_be_read_is_told_before_anything_starts(flags: str, what: str, mend: str) -> None:
    problem = only(using(f"generate {flags} --run.backend vllm --data.max-len 64"))
    assert what in problem.what and mend in problem.mend
    assert flags.partition(" ")[0] in problem.where


@pytest.mark.parametrize("flags", ["--vllm.quantization fp8 --vllm.sync-tolerance 0.5", "--vllm.pipeline-parallel-size 2"])
def test_what_engines_do_on_gpus_only_is_refused_without_one(flags: str) -> None:
    problem = only(crossed(f"grpo {flags}"))
    assert "needs GPUs, and none is visible" in problem.what and "drop --vllm." in problem.mend
    assert not crossed(f"grpo {flags}", gpus=4)
    assert "needs GPUs" in only(using(f"generate --run.backend vllm {flags.partition(' --vllm.sync')[0]}")).what


def test_a_quantised_engine_needs_a_tolerance_of_its_own() -> None:
    problem = only(crossed("grpo --vllm.quantization fp8", gpus=4))
    assert "does not know by how much" in problem.what and "--vllm.sync-tolerance 0.5" in problem.mend


def test_engines_of_several_parts_count_every_device() -> None:
    line = "grpo --vllm.num-engines 2 --vllm.pipeline-parallel-size 2 --vllm.tensor-parallel-size 2"
    assert "9 GPUs asked, 4 visible" in only(crossed(line, gpus=4)).what


def test_the_engine_in_this_process_holds_nothing_to_a_grammar() -> None:
    problem = only(using("generate --run.backend local --rollout.structured-outputs.regex a"))
    assert problem.what == "run.backend local holds no response to a grammar" and "--run.backend vllm" in problem.mend


def test_grammars_are_read_from_text_or_a_file_once(tmp_path: Path) -> None:
    config = settled("grpo").config.rollout
    schema, file = {"type": "object", "properties": {"a": {"type": "integer"}}}, tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    for text in (json.dumps(schema), str(file)):
        chosen = replaced(config, {"structured_outputs.json": text})
        assert json.loads(sampler_of(chosen)["structured_outputs"]) == {"json": schema}
    file.write_text("gone")
    assert json.loads(sampler_of(chosen)["structured_outputs"]) == {"json": schema}
    chosen = replaced(config, {"stop": '["a, b", "\\n"]'})
    assert sampler_of(chosen)["stop"] == ("a, b", "\n") and value_of(chosen, "stop") == '["a, b", "\\n"]'


def test_generate_draws_as_it_was_told(hone_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["generate", "--data.max-samples", "4", "--rollout.top-k", "1", "--out", str(out)]) == 0
    greedy = tmp_path / "greedy.jsonl"
    assert main(["generate", "--data.max-samples", "4", "--rollout.temperature", "0", "--out", str(greedy)]) == 0
    rows, likeliest = ([json.loads(line)["response"] for line in file.read_text().splitlines()] for file in (out, greedy))
    assert rows == likeliest  # of one token to draw from, the likeliest
    assert main(["generate", "--data.max-samples", "4", "--rollout.stop", "1", "--out", str(tmp_path / "stop.jsonl")]) == 0
    for line in (tmp_path / "stop.jsonl").read_text().splitlines():
        assert "1" not in json.loads(line)["response"][:-1]
