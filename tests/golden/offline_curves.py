"""Ten steps of every program over labelled rows, as text: whole runs of the command on a small random model and the built-in rows."""

import json
import sys
from pathlib import Path

from hone.datasets.tasks.labelled_arithmetic import pairs
from hone.launch.builtin import BuiltinModel, write_untrained
from hone.launch.cli import main as launch
from hone.launch.observe.run_directory import read_metrics

STEPS = 10
PAIRED = ("train/loss", "train/accuracy", "train/reward_margin", "train/grad_norm")
# Name of the curve -> command and options beside those that all share, and the columns.
CURVES = {
    "sft": (["sft"], ("train/loss", "train/grad_norm")),
    "rm": (["rm"], PAIRED),
    "rm_margin": (["rm"], PAIRED),
    "log_exp": (["rm", "--loss", "log_exp"], PAIRED),
    "prm": (["prm"], ("train/loss", "train/accuracy", "train/grad_norm")),
    "dpo": (["dpo"], PAIRED),
    "cdpo": (["dpo", "--loss", "cdpo"], PAIRED),
    "ipo": (["dpo", "--loss", "ipo"], PAIRED),
    "rpo": (["dpo", "--loss", "rpo"], (*PAIRED, "train/nll")),
    "simpo": (["dpo", "--loss", "simpo"], PAIRED),
    "orpo": (["dpo", "--loss", "orpo"], (*PAIRED, "train/nll")),
    "kto": (["kto"], ("train/loss", "train/reward_margin", "train/kl_anchor", "train/grad_norm")),
    "kd": (["kd", "--teacher.top-k", "8"], ("train/loss", "train/distillation_loss", "train/nll", "train/grad_norm")),
}
SHARED = ["--recipe", "laptop", "--ds.param-dtype", "fp32", "--run.threads", "1", "--train.seed", "3", "--data.max-samples", "60"]
SIZES = ["--train.batch-size", "6", "--train.max-tokens-per-gpu", "128", "--data.max-len", "64", "--eval.max-samples", "12"]
LEARNING = ["--train.max-steps", str(STEPS), "--train.max-epochs", "1", "--model.adam.lr", "3e-3", "--eval.steps", "5"]


def small(directory: Path, *, seed: int = 0) -> Path:
    """A small random model of the built-in kind."""
    if not directory.exists():
        write_untrained(BuiltinModel(hidden_size=32, heads=2, key_value_heads=1, max_position_embeddings=64, seed=seed), directory)
    return directory


def words(name: str, directory: Path) -> list[str]:
    """The command line of a curve, but for where it is written."""
    command, _ = CURVES[name]
    teacher = ["--teacher.model-name-or-path", str(small(directory / "teacher", seed=1))] if name == "kd" else []
    separator = ["--data.step-separator", " "] if name == "prm" else []
    model = ["--model.model-name-or-path", str(small(directory / "model"))]
    # The one loss knows margins, and the other does not: over the same pairs they are told apart.
    margins = with_margins(directory) if name in ("rm_margin", "log_exp") else []
    return [*command, *SHARED, *SIZES, *LEARNING, *model, *teacher, *separator, *margins]


def with_margins(directory: Path) -> list[str]:
    """Options for pairs of the built-in task that say by how much the one is better, to learn from and to be measured."""
    files = {"--data.dataset": (3, 60), "--eval.dataset": (4, 12)}
    for name, (seed, count) in files.items():
        rows = [{**row.columns, "margin": place % 4 / 2} for place, row in enumerate(pairs(seed, count).rows)]
        (directory / f"{name[2:]}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [word for name in files for word in (name, str(directory / f"{name[2:]}.jsonl"))]


def record(name: str, directory: Path) -> list[dict[str, int | float]]:
    """The steps of a run."""
    run = directory / name
    assert launch([*words(name, directory), "--run.dir", str(run)]) == 0
    return read_metrics(run)[0]


def text(name: str, steps: list[dict[str, int | float]]) -> str:
    """One line a step, five decimals: below that two kinds of processor may differ."""
    columns = CURVES[name][1]
    lines = ["step " + " ".join(columns)]
    lines += [f"{step['step']} " + " ".join(f"{step[column]:.5f}" for column in columns) for step in steps]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrite the committed curves: python -m tests.golden.offline_curves"""
    import tempfile

    for name in CURVES:
        with tempfile.TemporaryDirectory() as directory:
            (Path(__file__).parent / f"{name}.txt").write_text(text(name, record(name, Path(directory))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
