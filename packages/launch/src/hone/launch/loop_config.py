"""The configurations of the loops over generations: generate, score, select and train, iteration after iteration, in one command.

Groups and names are those of `launch generate` and of `launch sft` and `dpo`, which the stages of an iteration are.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal

from hone.algos.algorithms.dpo import DPO
from hone.algos.algorithms.sft import SFT
from hone.algos.offline import Offline
from hone.algos.ranges import Range
from hone.datasets.config import DataConfig
from hone.datasets.offline_config import PairData, SFTData
from hone.launch.config import RunConfig
from hone.launch.offline_config import (
    LOSSES,
    DPOConfig,
    OfflineCkptConfig,
    OfflineConfig,
    OfflineTrainConfig,
    ReferenceConfig,
    SFTConfig,
)
from hone.launch.using_config import GenerateConfig, ModelConfig, SamplingConfig, UsingConfig, UsingRunConfig
from hone.learner.config import ActorConfig, AdamConfig, DeepSpeedConfig
from hone.rollout.config import RewardConfig, VLLMConfig


@dataclass(frozen=True, kw_only=True)
class LoopSamplingConfig(SamplingConfig):
    """How responses are drawn."""

    batch_size: Annotated[int, Range(low=1)] = 10_240
    """Prompts of one iteration; each goes on where the one before stopped, and through the data again where it ends."""
    n_samples_per_prompt: Annotated[int, Range(low=1)] = 4
    """Responses drawn for each prompt, among which is chosen."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """vllm: one vLLM engine, in a process that ends before training begins; transformers: in this process, which needs no vLLM."""


@dataclass(frozen=True, kw_only=True)
class LoopRewardConfig(RewardConfig):
    """The judge: a function, a server or a reward model."""

    model_name_or_path: str | None = None
    """A reward model in place of `reward.remote_url`: a directory such as `launch rm` writes. It reads prompt and response as they are."""
    normalize_enable: bool = False
    """Scores of that model less the mean and by the deviation that stand in its configuration."""
    batch_size: Annotated[int, Range(low=1)] = 32
    """Responses that model reads at once."""


@dataclass(frozen=True, kw_only=True)
class LoopTrainConfig(OfflineTrainConfig):
    """The loop."""

    iterations: Annotated[int, Range(low=1)] = 5
    """Times that is generated, scored and trained, each with the model of the time before. The other settings here are of one iteration."""
    measure_last: bool = True
    """Have the last model answer and be judged once more, for the report."""


@dataclass(frozen=True, kw_only=True)
class LoopCkptConfig:
    """What a run that is stopped goes on with."""

    save_steps: Annotated[int, Range(low=-1)] = -1
    """Optimiser steps between two checkpoints of an iteration's training; -1: a training that is stopped begins again."""
    max_num: Annotated[int, Range(low=1)] = 3
    """Checkpoints kept of a training; an older one goes when a newer one is complete."""
    load_enable: bool = False
    """Go on in `run.dir`, after the last stage that is finished there; where there is nothing yet, begin."""
    resume: str | None = None
    """Go on in a run directory, or in `latest`, this command's newest in `runs/`, after the last stage that is finished there."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every loop is decided by; `verb` is the command, `trains` the one that its last stage is."""

    verb: ClassVar[str]
    trains: ClassVar[Literal["sft", "dpo"]] = "sft"
    built_in_unless: ClassVar[tuple[str, ...]] = ("model.model_name_or_path", "data.prompt_dataset")

    model: ActorConfig = field(default_factory=ActorConfig)
    """The model that answers and is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts and how they are rendered."""
    rollout: LoopSamplingConfig = field(default_factory=LoopSamplingConfig)
    """How responses are drawn."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """The inference engine."""
    reward: LoopRewardConfig = field(default_factory=LoopRewardConfig)
    """The judge: a function, a server or a reward model."""
    algo: Offline
    """The loss."""
    ds: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """How models are held and sharded."""
    train: LoopTrainConfig = field(default_factory=LoopTrainConfig)
    """The loop."""
    ckpt: LoopCkptConfig = field(default_factory=LoopCkptConfig)
    """What a run that is stopped goes on with."""
    run: RunConfig = field(default_factory=lambda: RunConfig(backend="local"))
    """Where and how the training is carried out."""

    @property
    def groups(self) -> list[str]:
        """Groups of settings of the models that have ranks of their own."""
        return ["model"]

    @property
    def unused(self) -> frozenset[str]:
        """Settings without an effect: of several engines whose weights change, and of scores that are learnt."""
        return UsingConfig.idle | {"ds.normalize_reward"}

    def generating(self, model: str, out: str = "generated.jsonl") -> GenerateConfig:
        """What `launch generate` would be asked for an iteration's responses by `model`."""
        sampling = {one.name: getattr(self.rollout, one.name) for one in fields(SamplingConfig)}
        return GenerateConfig(
            model=ModelConfig(model_name_or_path=model, param_dtype="fp32" if self.ds.param_dtype == "fp32" else "bf16"),
            data=self.data,
            rollout=SamplingConfig(**sampling),
            reward=RewardConfig(**{one.name: getattr(self.reward, one.name) for one in fields(RewardConfig)}),
            vllm=self.vllm,
            run=UsingRunConfig(
                backend="local" if self.rollout.engine == "transformers" else "vllm", threads=self.run.threads, debug=self.run.debug
            ),
            out=out,
        )

    def training(self, model: str | None, *, rows: str | None, directory: str | None, resume: str | None = None) -> OfflineConfig:
        """What `launch sft` (or dpo) would be asked for an iteration's training of `model` on the file `rows`."""
        return SFTConfig(algo=self.algo, data=SFTData(dataset=rows, max_len=self.data.max_len), **self._shared(model, directory, resume))

    def _shared(self, model: str | None, directory: str | None, resume: str | None) -> dict[str, Any]:
        """The settings of the training that do not depend on what is learnt from."""
        return {
            "model": replace(self.model, model_name_or_path=model),
            "ds": self.ds,
            "train": OfflineTrainConfig(**{one.name: getattr(self.train, one.name) for one in fields(OfflineTrainConfig)}),
            "ckpt": OfflineCkptConfig(save_steps=self.ckpt.save_steps, max_num=self.ckpt.max_num, best_metric_key="none", resume=resume),
            "run": RunConfig(dir=directory, backend=self.run.backend, threads=self.run.threads, debug=self.run.debug),
        }


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """What is learnt from."""

    above: float | None = None
    """A best response whose reward is not above this is not learnt from [reward]; without it, every prompt's best is."""


@dataclass(frozen=True, kw_only=True)
class RejectionSamplingConfig(LoopConfig):
    """The best of several responses to each prompt, imitated."""

    verb = "rejection-sampling"

    select: SelectConfig = field(default_factory=SelectConfig)
    """What is learnt from."""


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """How a prompt tells the reward of its response."""

    template: str = "{input} <rm_score>: {reward:.2f} "
    """The prompt as it is learnt and, from the second iteration, asked: {input} is the rendered prompt, {reward} the reward, to which
    Python's formats apply."""
    normalize: bool = False
    """Rewards less their mean and by their deviation over the iteration's responses; where all are equal, 0."""
    best: float | None = None
    """The reward asked for; without it, the highest of those that the iteration before learnt from [reward, normalised if they are]."""


@dataclass(frozen=True, kw_only=True)
class ConditionalSFTConfig(LoopConfig):
    """Responses imitated under prompts that tell their reward."""

    verb = "conditional-sft"

    condition: ConditionConfig = field(default_factory=ConditionConfig)
    """How a prompt tells the reward of its response."""


@dataclass(frozen=True, kw_only=True)
class LoopReferenceConfig(ReferenceConfig):
    """The frozen model that answers are compared with."""

    model_name_or_path: str | None = None
    """A Hugging Face model directory or hub id for all iterations; without one, `ref.follows` decides."""
    follows: Literal["iteration", "first"] = "iteration"
    """iteration: the model as the iteration began with it; first: the one the run began with."""


@dataclass(frozen=True, kw_only=True)
class IterativeDPOConfig(LoopConfig):
    """The best response to each prompt preferred to its worst."""

    verb = "iterative-dpo"
    trains = "dpo"

    loss: Literal["dpo", "cdpo", "ipo", "rpo", "simpo", "orpo"] = "dpo"
    """dpo; cdpo: some labels are taken to be swapped; ipo: a squared loss; rpo: dpo and the chosen answer's likelihood; simpo, orpo:
    no reference model. Each has settings of its own under `--algo.`."""
    ref: LoopReferenceConfig = field(default_factory=LoopReferenceConfig)
    """The frozen model that answers are compared with."""

    @property
    def unused(self) -> frozenset[str]:
        """Without a reference in the loss, none is set up."""
        return super().unused if "ref_logp" in self.algo.needs else super().unused | {"ref"}

    def training(self, model: str | None, *, rows: str | None, directory: str | None, resume: str | None = None) -> OfflineConfig:
        """See `LoopConfig`."""
        data = PairData(dataset=rows, max_len=self.data.max_len)
        ref = ReferenceConfig(model_name_or_path=self.ref.model_name_or_path, when=self.ref.when)
        return DPOConfig(algo=self.algo, loss=self.loss, data=data, ref=ref, **self._shared(model, directory, resume))


def default_loop(verb: str, loss: str | None = None) -> LoopConfig:
    """The configuration of a loop, and of its `--loss`, before any recipe, file or flag. Samples, prompts and iterations are OpenRLHF's."""
    if verb == "iterative-dpo":
        own: dict[str, Any] = {"loss": loss, "algo": LOSSES["dpo"][loss]} if loss in LOSSES["dpo"] else {"algo": DPO()}
        sampling = LoopSamplingConfig(n_samples_per_prompt=8)
        return IterativeDPOConfig(**own, model=ActorConfig(adam=AdamConfig(lr=5e-7)), rollout=sampling)
    model = ActorConfig(adam=AdamConfig(lr=2e-6))
    if verb == "rejection-sampling":
        return RejectionSamplingConfig(algo=SFT(), model=model, train=LoopTrainConfig(iterations=10))
    assert verb == "conditional-sft", f"{verb} is no loop"
    return ConditionalSFTConfig(algo=SFT(), model=model)
