"""The whole configuration of a training run: the groups users know, each a dataclass beside the code it configures."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from hone.algos.algorithms import ALGORITHMS
from hone.algos.protocol import Algorithm
from hone.algos.ranges import Range
from hone.datasets.config import DataConfig
from hone.launch.groups import compares_samples
from hone.launch.schema import replaced
from hone.learner.config import ActorConfig, CriticConfig, DeepSpeedConfig, RefConfig
from hone.rollout.config import RewardConfig, RolloutConfig, VLLMConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    batch_size: Annotated[int, Range(low=1)] = 128
    """Samples of one optimiser step; `rollout.batch_size * rollout.n_samples_per_prompt` samples are cut into such steps."""
    max_tokens_per_gpu: Annotated[int, Range(low=1)] = 16192
    """Hard cap of a packed micro-batch on one rank [tokens]; changes memory and speed, never the result."""
    enable_ema: bool = False
    """Keep an exponential moving average of the policy's weights, checkpointed with it and exported beside it as `model_ema/`."""
    ema_beta: Annotated[float, Range(low=0, high=1, open_high=True)] = 0.992
    """Decay of that average, once an optimiser step: average <- beta average + (1 - beta) weights."""
    micro_batch_size: Annotated[int, Range(low=1)] | None = None
    """Samples of a micro-batch at most, ranks then having equally many; without it, `train.max_tokens_per_gpu` alone decides."""
    max_epochs: Annotated[int, Range(low=1)] = 1
    """Times each rollout is trained on."""
    num_episodes: Annotated[int, Range(low=1)] = 1
    """Times the prompts are gone through."""
    max_steps: Annotated[int, Range(low=1)] | None = None
    """Stop after so many rollouts, however many prompts are left; without it, the prompts decide."""
    seed: Annotated[int, Range(low=0, high=2**32 - 1)] = 42
    """Seed of everything drawn: order of prompts, samples, initial value head."""
    async_enable: bool = False
    """Sample the next batches while the learner learns from this one; the samples are then some policy versions old."""
    async_queue_size: Annotated[int, Range(low=1)] = 1
    """Batches sampled ahead of the learner, where `async_enable`; so many versions old may samples be."""
    partial_rollout_enable: bool = False
    """Where `async_enable`: responses under way are held during a weight update and go on under the new weights, each token
    with its own version; without it, an update waits until they have ended."""


@dataclass(frozen=True, kw_only=True)
class CkptConfig:
    """What is saved on the way."""

    save_steps: Annotated[int, Range(low=-1)] = -1
    """Steps between two checkpoints, each with all a run needs to go on from it; -1 saves the model alone, at the end."""
    path: str | None = None
    """Directory of the checkpoints, one folder a step; without one, `checkpoints/` in the run directory."""
    max_num: Annotated[int, Range(low=1)] = 3
    """Checkpoints kept; an older one goes when a newer one is complete."""
    load_enable: bool = False
    """Go on from the newest complete checkpoint under `ckpt.path`, in a run directory of its own."""
    resume: str | None = None
    """Go on, in a run directory of its own, from a run directory, a directory of checkpoints, one `step_N` of it, or `latest`: the
    newest complete checkpoint of this command's newest run in `runs/` that has one."""
    save_hf: bool = False
    """With every checkpoint, also export the policy as a model directory, `step_N_hf` in the run directory's `checkpoints/`."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and how the run is carried out."""

    dir: str | None = None
    """Directory of everything the run writes, new or empty; without one, `runs/<verb>-<time>`."""
    backend: Literal["ray", "local"] = "ray"
    """ray: actors, vLLM and DeepSpeed; local: everything in this process, for a debugger or a machine without vLLM."""
    threads: Annotated[int, Range(low=1)] | None = None
    """CPU threads of each learner rank and engine; without it, the cores shared among the ranks (or engines) that compute at once."""
    debug: bool = False
    """Show tracebacks; `--debug` for short."""


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Which group of processes hosts a role; roles in one group share its processes and devices."""

    policy: str = "learner"
    """Group of the policy, of `actor.num_nodes * actor.num_gpus_per_node` ranks."""
    critic: str = "learner"
    """Group of the critic."""
    reference: str = "learner"
    """Group of the reference model."""
    engine: str = "rollout"
    """Group of the vLLM engines."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig:
    """Everything a policy-gradient run is decided by."""

    built_in_unless: ClassVar[tuple[str, ...]] = ("actor.model_name_or_path", "data.prompt_dataset")

    actor: ActorConfig = field(default_factory=ActorConfig)
    """The policy that is trained."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic: the policy's architecture with a value head."""
    ref: RefConfig = field(default_factory=RefConfig)
    """The frozen reference model, of the KL penalty or, in distillation, the teacher."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The judge."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How the policy acts."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """The inference engines."""
    ds: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """How models are held and sharded."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts and how they are rendered."""
    algo: Algorithm
    """The algorithm."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    ckpt: CkptConfig = field(default_factory=CkptConfig)
    """What is saved on the way."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where and how the run is carried out."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Which processes host which role."""

    @property
    def verb(self) -> str:
        """The command."""
        return self.algo.name

    @property
    def groups(self) -> list[str]:
        """Groups of settings of the models that the algorithm runs, the policy's first."""
        needed = {"actor": True, "critic": "values" in self.algo.needs, "ref": "ref_logp" in self.algo.needs}
        return [group for group, wanted in needed.items() if wanted]

    @property
    def ahead(self) -> bool:
        """Whether more is sampled than the step at hand is made of."""
        return self.train.async_enable or self.rollout.over_sampling > 1

    @property
    def unused(self) -> frozenset[str]:
        """Settings, or groups of them, without an effect."""
        return frozenset() if "values" in self.algo.needs else frozenset({"critic", "placement.critic"})


def default_config(verb: str) -> PolicyGradientConfig:
    """The configuration of a verb before any recipe, file or flag."""
    algo = ALGORITHMS[verb]()
    # A group baseline of one sample is the sample itself: where samples are compared, the default must be a group.
    rollout = RolloutConfig(n_samples_per_prompt=8) if compares_samples(algo) else RolloutConfig()
    config = PolicyGradientConfig(algo=algo, rollout=rollout)
    # A constant length is the longest response by its papers, whatever that was in theirs.
    return config if algo.reduction.length is None else replaced(config, {"algo.reduction.length": rollout.max_new_tokens})
