"""From a settled configuration and prepared rows to the parts of the loop: plan -> the reference's answers -> the model's ranks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import transformers

from hone.datasets.drawn_samples import Drawn
from hone.datasets.mismatched import Mismatched
from hone.launch.observe.progress import READY
from hone.launch.offline_config import ComparedConfig, KDConfig, OfflineConfig
from hone.launch.offline_data import OfflineData
from hone.launch.offline_groups import OfflinePlan, Ranks, reference_of
from hone.launch.offline_parts import MODEL, REFERENCE, OfflineAssembly, Table
from hone.launch.plan import vocabulary
from hone.launch.reference import ROWS_PER_CALL, Asked, Memory, key

Tables = tuple[Table, Table | None]


def make_plan(
    config: OfflineConfig,
    *,
    models: Mapping[str, str],
    data: OfflineData,
    steps: int,
    logs: Path,
    scratch: Path,
    on_start: Callable[[str, str], None],
) -> OfflinePlan:
    """The roles of a run and how long their schedules are. Raises ModelError for models that know other ids than the tokenizer."""
    vocabulary(models, data.tokenizer, trained=MODEL)
    described = transformers.AutoConfig.from_pretrained(models[MODEL]).get_text_config()
    return OfflinePlan(
        config=config,
        models=models,
        optimiser_steps=steps,
        hidden_size=int(described.hidden_size),
        vocabulary=int(described.vocab_size),
        logs=logs,
        scratch=scratch,
        on_start=on_start,
        reference_stays=_reference_stays(config, data),
    )


def _reference_stays(config: OfflineConfig, data: OfflineData) -> bool:
    """Whether the reference lives beside the model and is asked for the rows of a step as they are drawn."""
    if not isinstance(config, ComparedConfig) or "ref_logp" not in config.algo.needs:
        return False
    return config.ref.when == "drawn" or (config.ref.when == "auto" and isinstance(data.samples.samples, Drawn))


def tables_of(plan: OfflinePlan, data: OfflineData, ranks: Ranks, *, memory: Path) -> Tables:
    """The samples, and those held out, with what the reference says of them where the loss compares; `memory` keeps what it said."""
    config = plan.config
    every = [one.samples for one in (data.samples, data.held_out) if one is not None]
    if "ref_logp" not in config.algo.needs:
        return _two([Table(samples=samples) for samples in every])
    key_of = partial(key, model=plan.models[REFERENCE], ds=config.ds)
    tables: list[Table] = []
    for samples in every:
        each = len(samples[0].rows)
        said = Memory(memory, key_of(samples.fingerprint), rows=each * len(samples))
        table = Table(samples=samples, said=said, rows_each=each)
        if "anchor" in config.algo.needs:  # each prompt with another's answer
            others = Mismatched(samples, config.data.max_len)
            of_others = Memory(memory, key_of(f"{samples.fingerprint} {config.data.max_len}"), rows=len(samples))
            table = replace(table, mismatched=others, said_of_mismatched=of_others)
        tables.append(table)
    if not plan.reference_stays:
        _ask_all(tables, partial(reference_of, plan, ranks), lambda done, of: plan.on_start(REFERENCE, f"{done} of {of} rows"))
    return _two(tables)


def _ask_all(
    tables: Sequence[Table], reference: Callable[[], AbstractContextManager[Asked]], on_progress: Callable[[int, int], None]
) -> None:
    """Ask for all rows that the reference was not asked for yet; it is brought up only where there are any."""
    if all(table.known for table in tables):
        return
    done, total = 0, sum(len(table.samples) for table in tables)
    with reference() as asked:
        for table in tables:
            for start in range(0, len(table.samples), ROWS_PER_CALL):
                places = range(start, min(start + ROWS_PER_CALL, len(table.samples)))
                table.rows([table.samples[place] for place in places], places, asked)
                if table.mismatched is not None:
                    table.others(places, asked)
                before, done = done, done + len(places)
                if 4 * done // total > 4 * before // total:  # a word a quarter is enough
                    on_progress(done, total)


def assemble(
    plan: OfflinePlan, data: OfflineData, ranks: Ranks, tables: Tables, *, on_phase: Callable[[str, float | None], None]
) -> OfflineAssembly:
    """Load the model (and a teacher beside it), and connect it with its rows."""
    config = plan.config
    plan.on_start("learner", "loading the model")
    group = ranks.group("learner", plan.roles())
    plan.on_start("learner", READY)
    return OfflineAssembly(
        verb=config.verb,
        algo=config.algo,
        group=group,
        source=iter(data.stream),
        table=tables[0],
        held_out=tables[1],
        batch_size=config.train.batch_size,
        evaluate_every=data.stream.steps_per_epoch if config.eval.steps < 0 else config.eval.steps,
        last=plan.optimiser_steps,
        on_phase=on_phase,
        closers=[group.close],
        top_k=config.teacher.top_k if isinstance(config, KDConfig) else 0,
        vocabulary=plan.vocabulary,
    )


def _two(tables: Sequence[Table]) -> Tables:
    return tables[0], tables[1] if len(tables) > 1 else None
