"""`launch eval`: a model measured on a task, per data source; the figures as a table and in the run directory."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from hone.launch.answering import answer, asked, samples_of
from hone.launch.interrupt import Interrupt
from hone.launch.measured import Answered, ks, report
from hone.launch.observe import manifest
from hone.launch.observe.bar import bar
from hone.launch.observe.files import replace_text
from hone.launch.observe.run_directory import RunDirectory
from hone.launch.rollout_rows import rows
from hone.launch.toml import to_toml
from hone.launch.using_config import EvalConfig
from hone.rollout.executor import Group

REPORT = "eval.json"


def run(config: EvalConfig, sources: Mapping[str, str]) -> int:
    """Measure; returns the exit code. Raises DataError, ModelError, RewardError and EngineError."""
    console = Console(highlight=False, markup=False)
    everything = asked(config, console)
    n = 1 if config.rollout.temperature == 0 else config.rollout.n_samples_per_prompt
    k = ks(config.eval.k, n)
    directory = RunDirectory.create(config.run.dir, config.verb)
    directory.write_config(to_toml(config, sources))
    directory.write_manifest(manifest.collect(verb=config.verb, seed=config.rollout.seed, argv=sys.argv))
    answered: list[Answered] = []
    groups: list[Group] = []

    def keep(group: Group) -> None:
        answered.append(_answered(group, config.eval.source_key))
        groups.append(group)

    with Interrupt(lambda text: None), bar(unit="prompts", total=len(everything.prompts)) as progress:
        answer(
            config,
            everything,
            everything.prompts,
            n=n,
            judged=True,
            bar=progress,
            on_group=keep,
            log=directory.logs / "reward.log",
        )
    whole = [group if group.greedy is None else Group(prompt=group.prompt, samples=(group.greedy,)) for group in groups]
    directory.write_rollouts(1, rows(whole))
    found = {
        "model": everything.model,
        "data": everything.data.name,
        "left_out": len(everything.left_out),
        "samples_per_prompt": n,
        "temperature": config.rollout.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": config.rollout.seed,
        "pass_above": config.eval.pass_above,
        **report(answered, above=config.eval.pass_above, k=k),
    }
    replace_text(directory.path / REPORT, json.dumps(found, indent=2, allow_nan=False) + "\n")
    console.print(f"{everything.model} on {everything.data.name}", soft_wrap=True)
    console.print(_table(found, k))
    console.print(f"report and responses: {directory.path}", soft_wrap=True)
    return 0


def _answered(group: Group, source_key: str) -> Answered:
    samples = samples_of(group)
    source = group.prompt.columns.get(source_key)
    return Answered(
        source="" if source is None else str(source),
        rewards=tuple(sample.reward for sample in samples),
        tokens=tuple(int(sample.trajectory.action_mask.sum()) for sample in samples),
        truncated=tuple(sample.trajectory.truncated for sample in samples),
    )


def _table(found: Mapping[str, Any], k: list[int]) -> Table:
    """A line for each data source and one for the whole; pass@k in percent with its standard error."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("source")
    for name in ("prompts", *(f"pass@{each} [%]" for each in k), "reward", "tokens", "cut [%]"):
        table.add_column(name, justify="right")
    for name, own in {**found["sources"], "all": found["whole"]}.items():
        passes = [f"{100 * own[f'pass@{each}']:.1f} \N{PLUS-MINUS SIGN} {100 * own[f'pass@{each}_stderr']:.1f}" for each in k]
        ends = (f"{own['reward_mean']:.3f}", f"{own['tokens_mean']:.1f}", f"{100 * own['truncated_share']:.1f}")
        table.add_row(name, str(own["prompts"]), *passes, *ends)
    return table
