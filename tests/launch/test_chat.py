"""`launch chat`: what is typed is answered by a real model, token by token; commands, limits and Ctrl-C do what they say."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hone.launch.chat import engines
from hone.launch.chat.engines import drawn
from hone.launch.chat.talk import Words
from hone.launch.chat_config import ChatSamplingConfig
from hone.launch.cli import main
from tests.launch.running import COMMAND
from tests.rollout.chatting import write_chat_model

GREEDY = ["--rollout.temperature", "0", "--rollout.max-new-tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model")


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[str], *words: str) -> tuple[str, str]:
    """Answers and notes to lines that are piped in."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", *words]) == 0
    found = capsys.readouterr()
    return found.out, " ".join(found.err.split())


def expected(model: Path, messages: list[dict[str, str]], count: int = 6) -> str:
    """What transformers finds likeliest."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = policy.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_built_in_model_completes_each_line_alone(
    hone_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, notes = said(monkeypatch, capsys, ["3+4=", "3+4=", "1+1="], *GREEDY)
    one, again, other = answers.splitlines()
    assert one == again and {one.lstrip("-"), other.lstrip("-")} == {"7", "2"}
    assert "this model has no chat template, so what is typed and answered is one text, until an answer ends it" in notes


def test_without_a_template_a_line_goes_on_with_the_text_until_an_answer_ends_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked, answered = list[list[int]](), list[list[int]]()
    plain = engines.InThisProcess.stream

    def stream(self: engines.InThisProcess, question: engines.Asked) -> Generator[Sequence[int], None, None]:
        asked.append(list(question.tokens))
        answered.append([])
        for some in plain(self, question):
            answered[-1] += some
            yield some

    monkeypatch.setattr(engines.InThisProcess, "stream", stream)
    tokenizer, file = AutoTokenizer.from_pretrained(model), tmp_path / "texts.jsonl"
    # Behind a digit this model has much to say, and behind a letter nothing but its end.
    lines = ["add 1", " and 2", "/again", f"/save {file}", " done", f"/save {file}", "add 3", "/reset", "add 1", "/system x"]
    words = [str(model), "--engine", "transformers", "--raw", "--rollout.temperature", "0", "--rollout.max-new-tokens", "2"]
    answers, notes = said(monkeypatch, capsys, lines, *words, "--system", "be brief")

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    one, two, again, done, three, fresh = answered
    assert two == again and done == [tokenizer.eos_token_id] and min(map(len, (one, two, three, fresh))) == 2
    before = [*ids("add 1"), *one, *ids(" and 2")]
    whole = [*before, *two, *ids(" done")]
    assert asked == [ids("add 1"), before, before, whole, ids("add 3"), ids("add 1")]
    assert answers == "".join(tokenizer.decode(drawn, skip_special_tokens=True) + "\n" for drawn in answered)
    texts = [tokenizer.decode(found) for found in ([*before, *two], whole)]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"text": text} for text in texts]
    assert "the text is in" in notes and "--system has no effect" in notes and "there is no system message without" in notes


def test_what_was_said_is_remembered_until_it_is_forgotten(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "talk.jsonl"
    lines = ["how many?", "/system be brief", "more", f"/save {file}", "/reset", "how many?", f"/save {file}"]
    answers, notes = said(monkeypatch, capsys, lines, str(model), "--engine", "transformers", *GREEDY)
    first, second = ({"role": "user", "content": text} for text in ("how many?", "more"))
    system = {"role": "system", "content": "be brief"}
    one = expected(model, [first])
    two = expected(model, [system, first, {"role": "assistant", "content": one}, second])
    three = expected(model, [system, first])
    assert answers == f"{one}\n{two}\n{three}\n"
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [[message["role"] for message in row] for row in rows] == [
        ["system", "user", "assistant", "user", "assistant"],
        ["system", "user", "assistant"],
    ]
    assert rows[0][2]["content"] == one and "forgotten; the system message stays" in notes


def test_settings_and_seeds(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(model), "--engine", "transformers", "--rollout.max-new-tokens", "12"]
    lines = ["go", "/again", "/set max-new-tokens 2", "/again", "/set temperature 9", "/set temprature 1", "/set seed"]
    (one, notes), (again, _) = (said(monkeypatch, capsys, lines, *words) for _ in range(2))
    other, _ = said(monkeypatch, capsys, lines, *words, "--rollout.seed", "7")
    assert one == again != other
    first, second, third = one.split("\n")[:3]
    assert first != second and len(third) <= len(second)
    assert "cut at 2 tokens: /set max-new-tokens allows more" in notes
    assert (
        "temperature: 9.0 is out of range" in notes and "did you mean temperature?" in notes and "seed: expected int, got nothing" in notes
    )


def test_what_is_no_command_is_answered(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["/sav x", "/again", "/save", "/help", "//", "one \\", "two", "/quit", "never"]
    answers, notes = said(monkeypatch, capsys, lines, str(model), "--engine", "transformers", *GREEDY)
    assert "there is no /sav; did you mean /save?" in notes and "nothing was said yet" in notes and "there is nothing to save" in notes
    slash = {"role": "user", "content": "/"}
    one = expected(model, [slash])
    two = expected(model, [slash, {"role": "assistant", "content": one}, {"role": "user", "content": "one \ntwo"}])
    assert answers == f"{one}\n{two}\n" and "/system TEXT" in notes


def test_a_conversation_longer_than_the_context_is_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, notes = said(monkeypatch, capsys, ["x" * 200, "hi"], str(model), "--engine", "transformers", "--data.max-len", "80", *GREEDY)
    assert "and 80 is the longest; /reset forgets what was said" in notes
    assert answers == expected(model, [{"role": "user", "content": "hi"}]) + "\n"


def test_ctrl_c_stops_the_answer_and_not_the_conversation(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = [0]

    def pressed(logits: torch.Tensor, sampling: ChatSamplingConfig, generator: torch.Generator) -> int:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return drawn(logits, sampling, generator)

    monkeypatch.setattr(engines, "drawn", pressed)
    answers, notes = said(monkeypatch, capsys, ["go on", "and?"], str(model), "--engine", "transformers", *GREEDY)
    stopped = expected(model, [{"role": "user", "content": "go on"}], 2)
    assert answers.startswith(stopped + "\n") and answers.count("\n") == 2 and "stopped, 2 tokens" in notes


def test_half_a_character_waits_for_the_rest(model: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base = Tokenizer(models.BPE(vocab={byte: place for place, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    base.pre_tokenizer, base.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base)
    text = "a \u00fc\u20ac \U0001f600!"
    words = Words(tokenizer)
    pieces = [words.add([token]) for token in tokenizer.encode(text)]
    assert "".join(pieces) + words.rest() == text and "\ufffd" not in "".join(pieces)
    assert pieces[0] == "a" and "" in pieces


def test_top_p_keeps_the_fewest_likeliest_that_reach_it() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    found = {drawn(logits, ChatSamplingConfig(temperature=1.0, top_p=0.6), generator) for _ in range(200)}
    assert found == {0, 1}
    assert {drawn(logits, ChatSamplingConfig(temperature=1.0, top_p=0.5), generator) for _ in range(50)} == {0}
    assert {drawn(logits, ChatSamplingConfig(temperature=1.0, top_p=1.0), generator) for _ in range(400)} == {0, 1, 2, 3}
    assert drawn(logits, ChatSamplingConfig(temperature=0.0), generator) == 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_vllm_says_what_transformers_says(model: Path, tmp_path: Path) -> None:
    # A process of its own: vLLM changes what a process imports and logs.
    lines = "how many?\n/set max-new-tokens 3\nmore\n"
    words = [str(model), *GREEDY, "--engine", "vllm", "--vllm.kv-cache-gib", "0.25", "--data.max-len", "256", "--model.param-dtype", "fp32"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "chat", *words], input=lines, env=dict(os.environ), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    first = {"role": "user", "content": "how many?"}
    one = expected(model, [first])
    two = expected(model, [first, {"role": "assistant", "content": one}, {"role": "user", "content": "more"}], 3)
    assert done.stdout == f"{one}\n{two}\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["./missing"], "./missing"),
        (["--enigne", "vllm"], "did you mean --engine?"),
        (["--engine", "vlm"], "--engine {vllm,transformers}"),
        (["--rollout.top-p", "0"], "out of range"),
        (["--data.prompt-dataset", "p"], "no effect in this command"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_starts(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *words]) in (2, 5)
    assert told in " ".join(capsys.readouterr().err.split())
