"""The configuration of every program that learns from labelled rows: the groups users know, and what differs between the programs.

Where OpenRLHF's offline programs have a knob, it has their name: `--model.*`, `--data.*`, `--train.*`; the optimiser's stand under
`--model.` as well (`--adam.lr` is understood).
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from hone.algos.algorithms.distillation import Distillation
from hone.algos.algorithms.dpo import DPO
from hone.algos.algorithms.ipo import IPO
from hone.algos.algorithms.kto import KTO
from hone.algos.algorithms.orpo import ORPO
from hone.algos.algorithms.process_reward_model import ProcessRewardModel
from hone.algos.algorithms.reward_model import RewardModel
from hone.algos.algorithms.sft import SFT
from hone.algos.algorithms.simpo import SimPO
from hone.algos.offline import Offline
from hone.algos.ranges import Range
from hone.datasets.offline_config import DemonstrationData, JudgedData, LabelledData, MarginPairData, PairData, SFTData, StepData
from hone.launch.config import CkptConfig, RunConfig
from hone.learner.config import ActorConfig, AdamConfig, DeepSpeedConfig


@dataclass(frozen=True, kw_only=True)
class OfflineTrainConfig:
    """The loop."""

    batch_size: Annotated[int, Range(low=1)] = 128
    """Rows of the data in one optimiser step; a pair, or a conversation, is one row."""
    max_tokens_per_gpu: Annotated[int, Range(low=1)] = 16192
    """Hard cap of a packed micro-batch on one rank [tokens]; changes memory and speed, never the result."""
    micro_batch_size: Annotated[int, Range(low=1)] | None = None
    """Rows of tokens in a micro-batch at most (a pair has two); without it, `train.max_tokens_per_gpu` alone decides."""
    max_epochs: Annotated[int, Range(low=1)] = 1
    """Times the data is gone through."""
    max_steps: Annotated[int, Range(low=1)] | None = None
    """Stop after so many optimiser steps, however much data is left; without it, the data decides."""
    enable_ema: bool = False
    """Keep an exponential moving average of the weights, checkpointed with them and exported beside the model as `model_ema/`."""
    ema_beta: Annotated[float, Range(low=0, high=1, open_high=True)] = 0.992
    """Decay of that average, once an optimiser step: average <- beta average + (1 - beta) weights."""
    seed: Annotated[int, Range(low=0, high=2**32 - 1)] = 42
    """Seed of everything drawn: order of the rows, initial heads, adapters."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Rows that are measured on the way and never trained on."""

    dataset: str | None = None
    """A dataset of the same layout as `data.dataset`; without one nothing is measured, but for the built-in task."""
    steps: Annotated[int, Range(low=-1)] = -1
    """Optimiser steps between two evaluations; -1 evaluates after every epoch. The last step is always evaluated."""
    split: str = "train"
    """Split of it, or a part of one, as `data.dataset_split`."""
    max_samples: Annotated[int, Range(low=1)] = 1000
    """Rows used, from the start of the split."""


@dataclass(frozen=True, kw_only=True)
class OfflineCkptConfig(CkptConfig):
    """What is saved on the way."""

    best_metric_key: str = "eval/loss"
    """Metric of the evaluations by which the best model is kept, in `model_best/` of the run directory; none keeps the last alone."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen model that answers are compared with; asked once for every row, and remembered on disk."""

    model_name_or_path: str | None = None
    """A Hugging Face model directory or hub id; without one, the model as it was at the start."""
    when: Literal["auto", "before", "drawn"] = "auto"
    """before: asked for every row before training, and gone by then; drawn: lives beside the model, in the same ranks, and is asked for
    the rows of a step as they are drawn; auto: before, and for more than 100,000 rows drawn."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model that is learnt from; it lives beside the student, in the same ranks, and is sharded as it is."""

    model_name_or_path: str | None = None
    """A Hugging Face model directory or hub id of any size that shares the student's tokenizer."""
    top_k: Annotated[int, Range(low=0)] = 64
    """Tokens of the teacher's distribution that are looked at, the likeliest, all others as one; 0 for the whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """What every offline program is decided by; `verb` is the program's name, `kind` that of the model it trains."""

    verb: ClassVar[str]
    kind: ClassVar[Literal["policy", "reward", "process"]] = "policy"
    built_in_unless: ClassVar[tuple[str, ...]] = ("model.model_name_or_path", "data.dataset")

    model: ActorConfig = field(default_factory=ActorConfig)
    """The model that is trained."""
    ds: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """How models are held and sharded."""
    data: LabelledData
    """Rows to learn from, and how they are rendered."""
    algo: Offline
    """The loss."""
    train: OfflineTrainConfig = field(default_factory=OfflineTrainConfig)
    """The loop."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured on the way."""
    ckpt: OfflineCkptConfig = field(default_factory=OfflineCkptConfig)
    """What is saved on the way."""
    run: RunConfig = field(default_factory=lambda: RunConfig(backend="local"))
    """Where and how the run is carried out."""

    @property
    def trained_kind(self) -> Literal["policy", "reward", "process"]:
        """The kind of model that is trained: steps are judged by a classifier, unless a language model says reward tokens."""
        return self.kind

    @property
    def reading(self) -> LabelledData:
        """What rows are read by: `data`, without what the loss has no use for."""
        return self.data

    @property
    def groups(self) -> list[str]:
        """Groups of settings of the models that have ranks of their own, the trained one first."""
        return ["model"]

    @property
    def unused(self) -> frozenset[str]:
        """Settings, or groups of them, without an effect: scores are learnt and measured as they are."""
        return frozenset({"ds.normalize_reward"})

    @property
    def others(self) -> dict[str, str | None]:
        """Setting -> model of the roles beside the one that is trained, where one was named."""
        return {}


@dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineConfig):
    """Supervised fine-tuning."""

    verb = "sft"

    data: SFTData = field(default_factory=SFTData)
    """Demonstrations, and how they are rendered."""


@dataclass(frozen=True, kw_only=True)
class ComparedConfig(OfflineConfig):
    """Programs with a reference model."""

    ref: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The frozen model that answers are compared with; asked once for every row, and remembered on disk."""

    @property
    def unused(self) -> frozenset[str]:
        """Without a reference in the loss, none is set up."""
        return super().unused if "ref_logp" in self.algo.needs else super().unused | {"ref"}

    @property
    def others(self) -> dict[str, str | None]:
        """The reference, where it is another model."""
        return {"ref.model_name_or_path": self.ref.model_name_or_path} if "ref_logp" in self.algo.needs else {}


@dataclass(frozen=True, kw_only=True)
class DPOConfig(ComparedConfig):
    """Direct preference optimisation and its relatives."""

    verb = "dpo"

    loss: Literal["dpo", "cdpo", "ipo", "rpo", "simpo", "orpo"] = "dpo"
    """dpo; cdpo: some labels are taken to be swapped; ipo: a squared loss; rpo: dpo and the chosen answer's likelihood; simpo, orpo:
    no reference model. Each has settings of its own under `--algo.`."""
    data: PairData = field(default_factory=PairData)
    """Pairs of answers, and how they are rendered."""


@dataclass(frozen=True, kw_only=True)
class KTOConfig(ComparedConfig):
    """Kahneman-Tversky optimisation."""

    verb = "kto"

    data: JudgedData = field(default_factory=JudgedData)
    """Judged answers, and how they are rendered."""


@dataclass(frozen=True, kw_only=True)
class RMConfig(OfflineConfig):
    """A reward model."""

    verb = "rm"
    kind = "reward"

    loss: Literal["sigmoid", "log_exp"] = "sigmoid"
    """sigmoid: -log sigmoid(chosen - rejected - margin); log_exp: log(1 + exp(rejected - chosen)), which knows no margins."""
    data: MarginPairData = field(default_factory=MarginPairData)
    """Pairs of answers, and how they are rendered."""

    @property
    def reading(self) -> LabelledData:
        """Pairs without margins, where the loss knows none."""
        if self.loss == "sigmoid":
            return self.data
        return PairData(**{one.name: getattr(self.data, one.name) for one in fields(PairData)})

    @property
    def unused(self) -> frozenset[str]:
        """Margins, where the loss knows none."""
        return super().unused | {"data.margin_key"} if self.loss == "log_exp" else super().unused


@dataclass(frozen=True, kw_only=True)
class PRMConfig(OfflineConfig):
    """A process reward model."""

    verb = "prm"

    data: StepData = field(default_factory=StepData)
    """Solutions in steps, and how they are read."""

    @property
    def trained_kind(self) -> Literal["policy", "process"]:
        """See `OfflineConfig`."""
        return "process" if self.data.reward_tokens is None else "policy"

    @property
    def unused(self) -> frozenset[str]:
        """Ids of reward tokens are found from their texts; steps are tokenised as they stand."""
        return super().unused | {"algo.reward_tokens", "data.input_template", "data.apply_chat_template"}


@dataclass(frozen=True, kw_only=True)
class KDConfig(OfflineConfig):
    """Knowledge distillation."""

    verb = "kd"

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The model that is learnt from; it lives beside the student, in the same ranks, and is sharded as it is."""
    data: DemonstrationData = field(default_factory=DemonstrationData)
    """Demonstrations, and how they are rendered."""

    @property
    def others(self) -> dict[str, str | None]:
        """The teacher."""
        return {"teacher.model_name_or_path": self.teacher.model_name_or_path}


LOSSES: dict[str, dict[str, Offline]] = {
    "dpo": {
        "dpo": DPO(),
        "cdpo": DPO(label_smoothing=0.1),
        "ipo": IPO(),
        "rpo": DPO(nll_loss_coef=1.0),
        "simpo": SimPO(),
        "orpo": ORPO(),
    },
    "rm": {"sigmoid": RewardModel(), "log_exp": RewardModel()},
}
"""What `--loss` chooses, with the defaults that go with it."""


def default_offline(verb: str, loss: str | None = None) -> OfflineConfig:
    """The configuration of a verb, and of its `--loss`, before any recipe, file or flag. Learning rates and epochs are OpenRLHF's."""
    losses = LOSSES.get(verb, {})
    chosen: dict[str, Any] = {"loss": loss, "algo": losses[loss]} if loss in losses else {}

    def model(lr: float) -> ActorConfig:
        return ActorConfig(adam=AdamConfig(lr=lr))

    if verb == "sft":
        return SFTConfig(algo=SFT(), model=model(5e-6), train=OfflineTrainConfig(max_epochs=2))
    if verb == "dpo":
        return DPOConfig(**{"algo": DPO(), **chosen}, model=model(1e-5))
    if verb == "kto":
        return KTOConfig(algo=KTO(), model=model(1e-5))
    if verb == "rm":
        return RMConfig(**{"algo": RewardModel(), **chosen}, model=model(9e-6))
    if verb == "prm":
        return PRMConfig(algo=ProcessRewardModel(), model=model(1e-6))
    assert verb == "kd", f"{verb} is no offline program"
    return KDConfig(algo=Distillation(), model=model(5e-6))
