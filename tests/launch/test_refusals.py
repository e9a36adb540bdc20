"""What a run refuses to call finished, and what it refuses to begin."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hone.launch.cli import main
from hone.launch.parts import Assembly
from hone.rollout.executor import Group
from tests.launch.conftest import MADE_UP, SHORT_IS_GOOD, save_model, write_reward, write_rows
from tests.launch.test_local_run import own


def test_a_prompt_that_is_lost_on_the_way_is_not_a_finished_run(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = Assembly.act

    def forgetful(parts: Assembly, prompts: list[object], *, step: int) -> list[Group]:
        return honest(parts, prompts, step=step)[1:]

    monkeypatch.setattr(Assembly, "act", forgetful)
    model = save_model(tmp_path / "model", tokenizer, kind="llama", tied=True)
    prompts, reward = write_rows(tmp_path / "rows.jsonl", MADE_UP), write_reward(tmp_path / "reward.py", SHORT_IS_GOOD)
    assert main(["grpo", *own(model, prompts, reward, tmp_path / "run")]) == 1
    assert "2 prompts were drawn and neither trained nor dropped" in capsys.readouterr().err


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", tokenizer, kind="qwen3", tied=False)
    grown = AutoTokenizer.from_pretrained(model)
    grown.add_tokens(["<added>"])
    grown.save_pretrained(model)
    prompts, reward = write_rows(tmp_path / "rows.jsonl", MADE_UP), write_reward(tmp_path / "reward.py", SHORT_IS_GOOD)
    assert main(["grpo", *own(model, prompts, reward, tmp_path / "run")]) == 5
    assert "resize_token_embeddings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--actor.num-gpus-per-node 3 --ds.ring-attn-size 2", "learner ranks do not fall into rings of 2"),
        (
            "--actor.num-gpus-per-node 2 --ds.ring-attn-size 2 --train.max-tokens-per-gpu 200 --data.max-len 500",
            "a sample of 500 tokens does not fit a micro-batch of 400",
        ),
        ("--resume run --ckpt.load-enable --ckpt.path run", "both say where to go on from"),
    ],
)
def test_what_cannot_be_packed_or_taken_up_ends_with_2_before_anything_is_made(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ppo", *words.split(), "--run.dir", "run"]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
