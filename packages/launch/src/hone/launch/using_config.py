"""The configurations of the commands that use a model and train none: generate, eval and serve-rm.

Groups and names are those of the training commands wherever a knob is the same.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from hone.algos.ranges import Range
from hone.datasets.config import DataConfig
from hone.rollout.config import RewardConfig, SamplerConfig, VLLMConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is used."""

    model_name_or_path: str | None = None
    """A Hugging Face model directory or hub id; without one, the built-in model."""
    param_dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision its weights are held in."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(SamplerConfig):
    """How responses are drawn."""

    n_samples_per_prompt: Annotated[int, Range(low=1)] = 1
    """Responses drawn for each prompt."""
    max_new_tokens: Annotated[int, Range(low=1)] = 1024
    """Longest response [tokens]; a longer one is cut, and said to be."""
    temperature: Annotated[float, Range(low=0, high=2)] = 1.0
    """Sampling temperature; 0 takes the likeliest token each time."""
    seed: Annotated[int, Range(low=0, high=2**32 - 1)] = 42
    """Seed of every response, together with its prompt and number: the same on any machine, however a run is cut."""
    timeout_s: Annotated[float, Range(low=0, open_low=True)] = 1800.0
    """Deadline for all samples of one prompt [s]; an engine that misses it ends the run."""


@dataclass(frozen=True, kw_only=True)
class UsingRunConfig:
    """Where and how it is carried out."""

    backend: Literal["vllm", "local"] = "vllm"
    """vllm: one vLLM engine; local: transformers in this process, which starts in seconds and needs no vLLM."""
    threads: Annotated[int, Range(low=1)] | None = None
    """CPU threads; without it, all cores of this machine."""
    debug: bool = False
    """Show tracebacks; `--debug` for short."""


@dataclass(frozen=True, kw_only=True)
class EvalRunConfig(UsingRunConfig):
    """Where and how it is carried out."""

    dir: str | None = None
    """Directory of the report and the responses, new or empty; without one, `runs/eval-<time>`."""


@dataclass(frozen=True, kw_only=True)
class UsingConfig:
    """What every one of them is decided by; `verb` is the command."""

    verb: ClassVar[str]
    built_in_unless: ClassVar[tuple[str, ...]] = ("model.model_name_or_path", "data.prompt_dataset")
    idle: ClassVar[frozenset[str]] = frozenset(
        f"vllm.{name}"
        for name in (
            *("num_engines", "max_replacements", "min_engines", "health_timeout_s", "dtype", "sync_backend", "sync_delta"),
            *("sync_adapters_only", "sync_timeout_s", "sync_tolerance", "enable_sleep", "sleep_level"),
        )
    )

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model that is used."""

    @property
    def unused(self) -> frozenset[str]:
        """Settings without an effect: those of several engines whose weights change."""
        return self.idle


@dataclass(frozen=True, kw_only=True)
class AnsweringConfig(UsingConfig):
    """What generate and eval share."""

    data: DataConfig = field(default_factory=DataConfig)
    """Prompts and how they are rendered."""
    rollout: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are drawn."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The judge."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """The inference engine."""
    run: UsingRunConfig = field(default_factory=UsingRunConfig)
    """Where and how it is carried out."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AnsweringConfig):
    """Responses into a file."""

    verb = "generate"

    out: str = "responses.jsonl"
    """File of the responses, JSON lines or Parquet by its ending (.jsonl, .parquet); one that was begun with the same settings is
    gone on with."""
    best_of: Annotated[int, Range(low=1)] | None = None
    """Draw so many responses for each prompt and write the one with the highest reward alone."""


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured."""

    k: str | None = None
    """Each k of pass@k, from 1 to the samples of a prompt, separated by commas; without any, 1, 2, 4, ... and the samples of a prompt."""
    pass_above: float = 0.5
    """A response is right where its reward is above this [reward]."""
    source_key: str = "data_source"
    """Column by which the figures are told apart; rows without it count for the whole alone."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(AnsweringConfig):
    """A model measured on a task."""

    verb = "eval"

    eval: MeasureConfig = field(default_factory=MeasureConfig)
    """What is measured."""
    run: EvalRunConfig = field(default_factory=EvalRunConfig)
    """Where and how it is carried out."""


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(ModelConfig):
    """The reward model that judges."""

    model_name_or_path: str | None = None
    """A directory that loads as AutoModelForSequenceClassification with one label, such as `launch rm` writes."""
    max_len: Annotated[int, Range(low=1)] = 2048
    """Longest query [tokens]; of a longer one the beginning is left out, so that the response is judged to its end."""
    normalize: bool = False
    """Scores less the mean and by the deviation that stand in the model's configuration."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The server."""

    host: str = "127.0.0.1"
    """Address to listen at; the default lets nobody in but this machine."""
    port: Annotated[int, Range(low=0, high=65535)] = 5000
    """Port; 0 for any that is free, which is printed."""
    max_rows: Annotated[int, Range(low=1)] = 1024
    """Most rows of one request; one with more is answered 413."""
    max_bytes: Annotated[int, Range(low=1024)] = 16 * 2**20
    """Largest request [bytes]; a larger one is answered 413."""
    max_waiting: Annotated[int, Range(low=1)] = 256
    """Requests judged or waiting at a time; further ones are answered 503 and come again."""
    batch_size: Annotated[int, Range(low=1)] = 32
    """Rows the model reads at once; rows of different requests are put together."""


@dataclass(frozen=True, kw_only=True)
class ServingRunConfig:
    """Where and how it is carried out."""

    threads: Annotated[int, Range(low=1)] | None = None
    """CPU threads of the model; without it, all cores of this machine."""
    debug: bool = False
    """Show tracebacks; `--debug` for short."""


@dataclass(frozen=True, kw_only=True)
class ServeRMConfig(UsingConfig):
    """A judge behind HTTP."""

    verb = "serve-rm"

    model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """The reward model that judges."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The function that judges, in place of a model."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """The server."""
    run: ServingRunConfig = field(default_factory=ServingRunConfig)
    """Where and how it is carried out."""

    @property
    def unused(self) -> frozenset[str]:
        """Settings of asking servers: here is one."""
        return frozenset(f"reward.{name}" for name in ("retry_s", "rows_per_request", "max_in_flight", "allowed_hosts"))


def default_using(verb: str) -> UsingConfig:
    """The configuration of a command before any recipe, file or flag."""
    measured = EvalConfig(rollout=SamplingConfig(n_samples_per_prompt=4, temperature=0.6))
    return {"generate": GenerateConfig(), "eval": measured, "serve-rm": ServeRMConfig()}[verb]
