"""From a settled configuration and prepared rows to the parts of the loop: plan -> the reference's answers -> the model's ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import transformers

from hone.datasets.labelled import Drawable, TokenRow
from hone.datasets.lazy import Joined, Lazy, Span
from hone.datasets.mismatched import Mismatched
from hone.launch.observe.progress import READY
from hone.launch.offline_config import KDConfig, OfflineConfig
from hone.launch.offline_data import OfflineData
from hone.launch.offline_groups import OfflinePlan, Ranks, reference_of
from hone.launch.offline_parts import MODEL, OfflineAssembly, Table
from hone.launch.plan import vocabulary
from hone.launch.reference import remembered

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
    )


def tables_of(plan: OfflinePlan, data: OfflineData, ranks: Ranks, *, memory: Path) -> Tables:
    """The samples, and those held out, with what the reference says of them where the loss compares; `memory` keeps what it said."""
    config = plan.config
    every = [one.samples for one in (data.samples, data.held_out) if one is not None]
    if "ref_logp" not in config.algo.needs:
        return _two([Table(samples=samples) for samples in every])
    # Each prompt with another's answer, where an anchor is measured on them.
    joined = [Mismatched(samples, config.data.max_len) if "anchor" in config.algo.needs else () for samples in every]
    each = len(every[0][0].rows)
    asked = [part for samples, others in zip(every, joined, strict=True) for part in (RowsOf(samples, each), others)]
    answers = remembered(
        Joined(asked),
        model=plan.models["reference"],
        ds=config.ds,
        directory=memory,
        reference=partial(reference_of, plan, ranks),
        on_progress=lambda done, of: plan.on_start("reference", f"{done} of {of} rows"),
    )
    ends = list(accumulate(map(len, asked)))
    spans = [Span(answers, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return _two(
        [
            Table(samples=samples, ref_logp=own, rows_each=each, mismatched=others, mismatched_ref_logp=of_others)
            for samples, others, own, of_others in zip(every, joined, spans[::2], spans[1::2], strict=True)
        ]
    )


class RowsOf(Lazy[TokenRow]):
    """The rows of tokens of all samples, of which each has as many."""

    def __init__(self, samples: Drawable, each: int) -> None:
        self._samples, self._each = samples, each

    def __len__(self) -> int:
        return self._each * len(self._samples)

    def _at(self, index: int) -> TokenRow:
        return self._samples[index // self._each].rows[index % self._each]

    def __iter__(self) -> Iterator[TokenRow]:
        """Every row in order."""
        return (row for sample in self._samples for row in sample.rows)


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
