"""The whole road on one CPU: imitation, a reward model, PPO against it, pairs, verdicts, judged steps, and a smaller student.

    uv run python examples/road.py [--seed 0] [--out runs/road]

All of it is learnt from sums of examples/sums.jsonl and measured on others of them: a sum and its mirror (3+4, 4+3) are both learnt
from or both held out. The built-in model gives two answers of three the wrong sign, and can learn not to. Each stage is a command
line of `launch`, shown as it is run; this file only makes their rows. It ends with a table, and with 1 where a stage that should raise
an accuracy did not.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hone.launch.builtin import BuiltinModel, builtin_model

LAUNCH = [sys.executable, "-c", "from hone.launch.cli import main; raise SystemExit(main())"]
SUMS = [json.loads(line) for line in Path(__file__).with_name("sums.jsonl").read_text().splitlines()]
HELD_OUT = 18
"""Sums that are measured on, a mirror not counted; the other 36 are learnt from."""
STUDENT = BuiltinModel(hidden_size=64)
"""Made from the same sums as the built-in model, of a quarter of its size."""

SMALL = ["--data.max-len", "64", "--run.backend", "local", "--run.threads", "1"]
LEARNING = [*SMALL, "--train.batch-size", "32"]
ANSWERING = [*SMALL, "--rollout.max-new-tokens", "6", "--rollout.temperature", "1"]

TRUTH = ["--data.label-key", "label", "--reward.remote-url", "hone.datasets.tasks.arithmetic"]

Row = Mapping[str, object]


class Road:
    """One run: a folder for each stage, and the models that are being measured beside the next one."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.measuring: dict[str, subprocess.Popen[bytes]] = {}

    def rows(self, name: str, rows: Iterable[Row]) -> str:
        """A file of rows."""
        file = self.out / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    def start(self, stage: str, *words: str) -> subprocess.Popen[bytes]:
        """A command, begun; what it prints goes to a file of its stage."""
        print("launch", *words, flush=True)
        with (self.out / f"{stage}.log").open("wb") as log:
            return subprocess.Popen([*LAUNCH, *words], stdout=log, stderr=subprocess.STDOUT)

    def end(self, stage: str, process: subprocess.Popen[bytes]) -> None:
        """Wait for it; ends this script, too, where it failed."""
        if process.wait():
            sys.exit(f"{stage} ended with {process.returncode}:\n{(self.out / f'{stage}.log').read_text()[-2000:]}")

    def launch(self, stage: str, *words: str) -> None:
        """A command from its start to its end."""
        began = time.monotonic()
        self.end(stage, self.start(stage, *words))
        print(f"    {stage}: {time.monotonic() - began:.0f} s", flush=True)

    def train(self, stage: str, *words: str) -> str:
        """A command that trains; the directory of its model."""
        self.launch(stage, *words, "--run.dir", str(self.out / stage))
        return str(self.out / stage / "model")

    def held_out_accuracy(self, stage: str) -> float:
        """What a stage measured on rows that were held out, after its last step."""
        steps = [json.loads(line) for line in (self.out / stage / "metrics.jsonl").read_text().splitlines()]
        return float([step for step in steps if "eval/accuracy" in step][-1]["eval/accuracy"])

    def measure(self, stage: str, model: str, prompts: str) -> None:
        """How often a model is right when it is asked 16 times for each sum; beside the stage that comes next."""
        self.measured()
        words = ["--model.model-name-or-path", model, "--data.prompt-dataset", prompts, *TRUTH, *ANSWERING]
        own = ["--rollout.n-samples-per-prompt", "16", "--eval.k", "1", "--run.dir", str(self.out / f"eval-{stage}")]
        self.measuring[stage] = self.start(f"eval-{stage}", "eval", *words, *own)

    def measured(self) -> dict[str, float]:
        """The share of right answers of every model so far."""
        for stage, process in self.measuring.items():
            self.end(f"eval-{stage}", process)
        return {stage: json.loads((self.out / f"eval-{stage}" / "eval.json").read_text())["whole"]["pass@1"] for stage in self.measuring}

    @contextmanager
    def served(self, model: str) -> Iterator[str]:
        """A reward model behind HTTP, and its address."""
        process = self.start("serve-rm", "serve-rm", "--model.model-name-or-path", model, "--server.port", "0", "--run.threads", "1")
        try:
            while "rewards at " not in (told := (self.out / "serve-rm.log").read_text()):
                if process.poll() is not None:
                    sys.exit(f"serve-rm ended with {process.returncode}:\n{told}")
                time.sleep(0.2)
            yield told.partition("rewards at ")[2].partition(";")[0]
        finally:
            process.terminate()
            process.wait()


def split(draw: random.Random) -> tuple[list[Row], list[Row]]:
    """The sums to learn from, and those to measure on."""
    kinds = sorted({_kind(row) for row in SUMS})
    held_out = set(draw.sample(kinds, HELD_OUT))
    return [row for row in SUMS if _kind(row) not in held_out], [row for row in SUMS if _kind(row) in held_out]


def _kind(row: Row) -> tuple[str, ...]:
    return tuple(sorted(str(row["question"]).rstrip("=").split("+")))


def said(row: Row, *, right: bool) -> str:
    """The right answer, or the one with the wrong sign."""
    return f"{'' if right else '-'}{row['answer']}"


def demonstrations(rows: Iterable[Row], *, right: int, wrong: int) -> Iterator[Row]:
    """Every sum with so many right answers and so many wrong ones."""
    for row in rows:
        for is_right in [True] * right + [False] * wrong:
            yield {"prompt": row["question"], "completion": said(row, right=is_right)}


def pairs(rows: Iterable[Row]) -> Iterator[Row]:
    """The right answer beside the wrong one."""
    for row in rows:
        yield {"prompt": row["question"], "chosen": said(row, right=True), "rejected": said(row, right=False)}


def in_steps(rows: Iterable[Row]) -> Iterator[Row]:
    """Each sum and its mirror, one after the other, with every choice of right and wrong."""
    for row in rows:
        left, right = str(row["question"]).rstrip("=").split("+")
        for marks in ([True, True], [True, False], [False, True], [False, False]):
            written = [f"{sum_}={said(row, right=mark)}" for sum_, mark in zip((f"{left}+{right}", f"{right}+{left}"), marks, strict=True)]
            yield {"prompt": f"{row['question']} ", "completions": written, "labels": marks}


def best_and_worst(answers: Iterable[Row]) -> Iterator[Row]:
    """Of what a model answered to each prompt, what was scored highest and lowest, where these differ."""
    by_prompt: dict[object, list[Row]] = {}
    for answer in answers:
        by_prompt.setdefault(answer["prompt"], []).append(answer)
    for prompt, own in by_prompt.items():
        worst, best = (pick(own, key=lambda answer: float(str(answer["reward"]))) for pick in (min, max))
        if worst["response"] != best["response"]:
            yield {"prompt": prompt, "chosen": best["response"], "rejected": worst["response"]}


def verdicts(answers: Iterable[Row]) -> Iterator[Row]:
    """Every different answer to each prompt, and whether it is right."""
    for prompt, response, label in sorted({(str(one["prompt"]), str(one["response"]), str(one["label"])) for one in answers}):
        yield {"prompt": prompt, "completion": response, "label": response == label}


Line = tuple[str, str, float, float]
"""A stage, what its accuracy is of, and that before and after it, in [0, 1]."""


def walk(road: Road, seed: int) -> list[Line]:
    """Every stage, one after another."""
    learnt, held_out = split(random.Random(f"road:{seed}"))
    prompts, asked = (
        road.rows(name, ({"prompt": row["question"], "label": row["answer"]} for row in rows))
        for name, rows in (("prompts", learnt), ("held-out", held_out))
    )
    base, student = str(builtin_model()), str(builtin_model(STUDENT))
    seeded = ["--train.seed", str(seed)]

    def rows_of(model: str, rows: str, *, epochs: int, lr: float) -> list[str]:
        words = ["--model.model-name-or-path", model, "--data.dataset", rows, "--train.max-epochs", str(epochs)]
        return [*words, "--model.adam.lr", str(lr), *LEARNING, *seeded]

    road.measure("base", base, asked)
    # Imitate answers of which half are right: those who wrote them erred, too.
    imitated = road.rows("demonstrations", demonstrations(learnt, right=4, wrong=4))
    sft = road.train("sft", "sft", *rows_of(base, imitated, epochs=2, lr=3e-4))
    road.measure("sft", sft, asked)

    # Learn which of two answers is right; serve that judgement, and let PPO follow it.
    unseen = road.rows("held-out-pairs", pairs(held_out))
    judge = road.train("rm", "rm", *rows_of(sft, road.rows("pairs", pairs(learnt)), epochs=10, lr=1e-3), "--eval.dataset", unseen)
    with road.served(judge) as address:
        told = ["--data.prompt-dataset", prompts, "--reward.remote-url", address]
        steps = ["--train.num-episodes", "100", "--train.max-steps", "4", "--rollout.max-new-tokens", "6"]
        ppo = road.train("ppo", "ppo", "--actor.model-name-or-path", sft, *told, *steps, *SMALL, *seeded)
        road.measure("ppo", ppo, asked)
        # Its own answers, eight to a sum, each with the reward model's score.
        drawn = ["--data.label-key", "label", "--rollout.n-samples-per-prompt", "8", "--out", str(road.out / "answers.jsonl")]
        road.launch("generate", "generate", "--model.model-name-or-path", ppo, *told, *ANSWERING, *drawn)
    answers = [json.loads(line) for line in (road.out / "answers.jsonl").read_text().splitlines()]

    # Prefer the best of them to the worst; then take each for good or bad.
    preferred = road.rows("own-pairs", best_and_worst(answers))
    dpo = road.train("dpo", "dpo", *rows_of(ppo, preferred, epochs=4, lr=1e-4))
    road.measure("dpo", dpo, asked)
    kto = road.train("kto", "kto", *rows_of(dpo, road.rows("verdicts", verdicts(answers)), epochs=8, lr=6e-5))
    road.measure("kto", kto, asked)

    # Judge single steps.
    judged, unseen = road.rows("steps", in_steps(learnt)), road.rows("held-out-steps", in_steps(held_out))
    road.train("prm", "prm", *rows_of(sft, judged, epochs=3, lr=1e-3), "--eval.dataset", unseen, "--data.step-separator", " ")

    # Hand it all down to a smaller model.
    road.measure("student", student, asked)
    right = road.rows("right", demonstrations(learnt, right=1, wrong=0))
    taught = road.train("kd", "kd", *rows_of(student, right, epochs=10, lr=1e-3), "--teacher.model-name-or-path", kto)
    road.measure("kd", taught, asked)

    share = road.measured()
    return [
        ("sft", "answers", share["base"], share["sft"]),
        ("rm", "pairs", 0.5, road.held_out_accuracy("rm")),
        ("ppo", "answers", share["sft"], share["ppo"]),
        ("dpo", "answers", share["ppo"], share["dpo"]),
        ("kto", "answers", share["dpo"], share["kto"]),
        ("prm", "steps", 0.5, road.held_out_accuracy("prm")),
        ("kd", "the student's answers", share["student"], share["kd"]),
    ]


def main() -> int:
    """Walk, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/road"), help="a folder that is not there yet")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True)
    began = time.monotonic()
    lines = walk(Road(asked.out), asked.seed)
    print(f"\nright on what was held out [%], seed {asked.seed}, {time.monotonic() - began:.0f} s")
    print(f"{'stage':<8}{'of':<24}{'before':>8}{'after':>8}")
    for stage, what, before, after in lines:
        print(f"{stage:<8}{what:<24}{100 * before:>8.1f}{100 * after:>8.1f}{'' if after > before else '  did not rise'}")
    print("(a judge of pairs or of steps knows nothing before: 50 is chance)")
    return 0 if all(after > before for _, _, before, after in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
