"""The built-in task: sums that are right, a corpus that is wrong as often as asked, a judge that knows the difference."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.datasets.config import DataConfig
from hone.datasets.schemas import prompt_rows
from hone.datasets.tasks.arithmetic import build_tokenizer, imperfect_corpus, problems, reward_func, source
from hone.datasets.tokenise import tokenise
from hone.datasets.tokenizer import load_tokenizer, tokenizer_hash


def terms(prompt: str) -> tuple[int, int]:
    left, right = prompt.removesuffix("=").split("+")
    return int(left), int(right)


def test_sums_are_right_small_and_reach_every_total() -> None:
    drawn = problems(0, 2000)
    assert all(sum(terms(prompt)) == label <= 18 for prompt, label in drawn)
    assert {label for _, label in drawn} == set(range(1, 19))


def test_a_seed_fixes_the_sums_and_a_longer_list_begins_with_the_shorter() -> None:
    assert problems(4, 50)[:20] == problems(4, 20)
    assert problems(4, 50) != problems(5, 50)
    # 90 pairs lie by the first term, nine each; Random("arithmetic:0").random() * 90 begins 28.4 30.0 26.1, and
    # 28 = 3 * 9 + 1 is 3 + 2, 30 is 3 + 4 (29.99.. would be 3 + 3), 26 = 2 * 9 + 8 is 2 + 9.
    assert [tuple(problem) for problem in problems(0, 3)][::2] == [("3+2=", 5), ("2+9=", 11)]


def test_the_largest_term_is_an_argument() -> None:
    assert set(problems(0, 100, largest_term=1)) == {("0+1=", 1), ("1+1=", 2)}


def test_the_corpus_has_the_wrong_sign_exactly_as_often_as_asked() -> None:
    corpus = imperfect_corpus(1, 2 * 90 * 5, wrong=3, of=5)
    wrong: dict[str, int] = {}
    for prompt, response in corpus:
        assert abs(int(response)) == sum(terms(prompt))
        wrong[prompt] = wrong.get(prompt, 0) + (int(response) < 0)
    # Two decks of 90 sums, each sum five times, three of them wrong.
    assert wrong == dict.fromkeys(wrong, 6) and len(wrong) == 90
    assert imperfect_corpus(1, 10, wrong=3, of=5) == corpus[:10] != imperfect_corpus(2, 10, wrong=3, of=5)
    assert all(int(response) > 0 for _, response in imperfect_corpus(0, 50, wrong=0, of=5))


@pytest.mark.parametrize(
    "call",
    [
        lambda: problems(0, 0),
        lambda: problems(0, 1, largest_term=0),
        lambda: imperfect_corpus(0, 1, wrong=6, of=5),
        lambda: imperfect_corpus(0, 1, wrong=-1, of=5),
    ],
)
def test_arguments_out_of_range_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must"):
        call()


def judge(response: str, label: object, prompt: str = "7+12=") -> float:
    return reward_func([prompt + response], [prompt], [label])["rewards"][0]


@given(seed=st.integers(0, 50))
def test_the_judge_accepts_its_own_answers_and_rejects_the_wrong_ones(seed: int) -> None:
    drawn = problems(seed, 20)
    prompts, labels = [problem.prompt for problem in drawn], [problem.label for problem in drawn]
    right = reward_func([f"{problem.prompt}{problem.label}<eos>" for problem in drawn], prompts, labels)
    assert right == {"rewards": [1.0] * 20, "scores": [1.0] * 20, "extra_logs": {"answered": [1.0] * 20}}
    for offset in (-1, 1, 10):
        wrong = reward_func([f"{problem.prompt}{problem.label + offset}<eos>" for problem in drawn], prompts, labels)
        assert wrong == {"rewards": [0.0] * 20, "scores": [0.0] * 20, "extra_logs": {"answered": [1.0] * 20}}


@pytest.mark.parametrize("response", ["19", "19<eos>", " 19 <eos>", "19<|im_end|>\n", "19<eos><pad><pad>"])
def test_an_exact_answer_with_or_without_special_tokens_is_right(response: str) -> None:
    assert judge(response, 19) == judge(response, "19") == 1.0


@pytest.mark.parametrize(
    "response", ["", "<eos>", "1 9", "190", "-19", "19 20", "19=19", "<eos>19", "+19", "19.0", "\u0661\u0669", "9" * 5000]
)
def test_anything_but_the_integer_is_wrong(response: str) -> None:
    assert judge(response, 19) == 0.0


def test_a_negative_label_is_matched_with_its_sign() -> None:
    assert judge("-3<eos>", -3) == 1.0


def test_a_beginning_of_sequence_before_the_prompt_is_not_part_of_the_answer() -> None:
    assert reward_func(["<s>7+12=19</s>"], ["7+12="], [19])["rewards"] == [1.0]


def test_a_query_without_its_prompt_and_a_label_that_is_no_integer_are_errors() -> None:
    with pytest.raises(ValueError, match=r"query '1\+1=2' does not hold its prompt '7\+12='"):
        reward_func(["1+1=2"], ["7+12="], [2])
    with pytest.raises(ValueError, match="label None is not an integer"):
        judge("19", None)
    with pytest.raises(ValueError, match="shorter"):
        reward_func(["7+12=1", "7+12=1"], ["7+12=", "7+12="], [1])


def test_the_task_goes_the_way_of_a_file() -> None:
    rows = prompt_rows(source(0, 30), input_key="prompt", label_key="label", chat=False)
    done = tokenise(rows, build_tokenizer(), config=DataConfig(), max_new_tokens=4)
    assert [(record.text, record.label) for record in done.records] == [tuple(problem) for problem in problems(0, 30)]
    assert rows.fingerprint != source(1, 30).fingerprint


def test_the_tokenizer_has_a_token_per_character_and_loads_as_it_was_saved(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+-= "])}
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id) == (0, 1, 2, None)
    # "0" is id 3, so the digit d is d + 3; "+" 13, "-" 14, "=" 15, " " 16.
    assert tokenizer.encode("7+12= -1<eos>") == [10, 13, 4, 5, 15, 16, 14, 4, 1]
    assert tokenizer.encode("x\n") == [2, 2]
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert loaded.decode(loaded.encode("7 + 12 = 19<eos>")) == "7 + 12 = 19<eos>"
    assert loaded.decode([4, 12, 1], skip_special_tokens=True) == "19"


@pytest.mark.parametrize("module", ["hone.datasets", "hone.datasets.tasks.arithmetic", "hone.datasets.schemas", "hone.datasets.tokenizer"])
def test_importing_costs_no_heavy_library(module: str) -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'numpy', 'jinja2', 'huggingface_hub'}"
    code = f"import sys, {module}; loaded = {heavy} & set(sys.modules); sys.exit(str(loaded) if loaded else 0)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
