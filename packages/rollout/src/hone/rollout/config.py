"""Settings of rollout: sampling, engines, rewards."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hone.algos.ranges import Range


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """The grammar every response is held to, by vLLM's names; at most one of them, none by default."""

    json: str | None = None
    """A JSON schema, or a file with one: responses are JSON of that form."""
    json_object: bool = False
    """Responses are JSON objects of any form."""
    regex: str | None = None
    """A regular expression that the whole response matches."""
    choice: str | None = None
    """A JSON list of texts: the response is one of them."""
    grammar: str | None = None
    """A grammar in EBNF, or a file with one."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a response is drawn, beside the temperature. What reshapes the distribution is for generate and eval: no learner recomputes
    it, so training takes `stop` and `stop_token_ids` only.
    """

    top_p: Annotated[float, Range(low=0, high=1, open_low=True)] = 1.0
    """Draw from the likeliest tokens that hold so much of the probability; 1 for all."""
    top_k: Annotated[int, Range(low=0)] = 0
    """Draw from so many of the likeliest tokens; 0 for all."""
    min_p: Annotated[float, Range(low=0, high=1)] = 0.0
    """Leave out tokens less probable than this share of the likeliest; 0 for none."""
    repetition_penalty: Annotated[float, Range(low=0, open_low=True)] = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that stand in the prompt or the response; 1 changes nothing."""
    presence_penalty: Annotated[float, Range(low=-2, high=2)] = 0.0
    """Taken off the logit of every token that stands in the response."""
    frequency_penalty: Annotated[float, Range(low=-2, high=2)] = 0.0
    """Taken off the logit of a token for every time it stands in the response."""
    min_new_tokens: Annotated[int, Range(low=0)] = 0
    """Tokens before which nothing that ends a response may be drawn."""
    stop: str | None = None
    """Text that ends a response, or a JSON list of several; the tokens it was written with stay in the response."""
    stop_token_ids: str | None = None
    """Token ids that end a response beside the model's own, separated by commas; the one that did stays in it."""
    structured_outputs: StructuredOutputs = field(default_factory=StructuredOutputs)
    """The grammar responses are held to."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(SamplerConfig):
    """How the policy acts."""

    batch_size: Annotated[int, Range(low=1)] = 1024
    """Prompts drawn for one step."""
    n_samples_per_prompt: Annotated[int, Range(low=1)] = 1
    """Responses sampled for each prompt; they form its group."""
    max_new_tokens: Annotated[int, Range(low=1)] = 1024
    """Longest response [tokens]; a longer one is cut and counted as truncated."""
    temperature: Annotated[float, Range(low=0.01, high=2)] = 1.0
    """Sampling temperature; the learner recomputes log-probabilities under the same."""
    max_gap: Annotated[float, Range(low=0, open_low=True)] | None = None
    """Largest mean difference of the engine's and the learner's log-probabilities over a step's tokens [nats], as in the metric
    `mismatch/logp_abs_diff_mean`; a step above it ends the run with exit code 8 before it is learnt from, and the likely cause is named.
    Without it the gap is measured and marked only. Healthy: up to 0.02; samples that are some policy versions old need more."""
    timeout_s: Annotated[float, Range(low=0, open_low=True)] = 1800.0
    """Deadline for all samples of one prompt, or for one turn of an episode [s]; an engine that misses it ends the run."""
    dynamic_filtering: Literal["off", "range", "variance"] = "off"
    """Groups that are dropped, each replaced at once by a fresh prompt: range, those whose mean score is not strictly within
    `dynamic_filtering_range`; variance, those whose rewards are all the same; off, none."""
    dynamic_filtering_range: tuple[float, float] = (0.0, 1.0)
    """Bounds of the mean score, where `dynamic_filtering` is range."""
    dynamic_filtering_batches: Annotated[int, Range(low=1)] = 10
    """Most prompts drawn for one step, in batches; after that the step is trained on with the groups it has."""
    over_sampling: Annotated[float, Range(low=1, high=16)] = 1.0
    """Prompts under way for a step, as a multiple of `batch_size`: the step goes on with the first full batch. That favours prompts
    with short responses, whose groups finish first; 1 waits for every prompt and favours none."""
    straggler_policy: Literal["abort", "reissue", "keep"] = "abort"
    """Prompts still under way when their step has a full batch: abort drops them; reissue begins them anew for a later step, under its
    weights; keep lets them go on (needs `train.partial_rollout_enable`), and drops those that become too old."""
    max_staleness: Annotated[int, Range(low=0)] | None = None
    """Policy versions that a trained token may be behind the one that learns; default `train.async_queue_size` (0 without
    `train.async_enable`), and 1 more with over-sampling. More lets steps go on without their slowest prompts for longer."""
    agent_func_path: str | None = None
    """A Python file with the environment of multi-turn episodes (`AgentInstance` or `make_env`), or with an agent that owns its loop
    (`agent`); it gives the rewards, too."""
    agent_command: str | None = None
    """A command that plays one episode each time it is started, against an endpoint of the policy in its environment
    (OPENAI_BASE_URL, ANTHROPIC_BASE_URL, their keys); the row comes on its standard input, its last line gives the reward."""
    agent_timeout_s: Annotated[float, Range(low=0, open_low=True)] = 1800.0
    """Deadline for one episode of an agent that owns its loop [s]; one that misses it is killed and ends the run."""
    agents_in_flight: Annotated[int, Range(low=1)] = 32
    """Agents that own their loop going on at a time, each a process where it is a command."""
    agent_history: Literal["verbatim", "template"] = "verbatim"
    """What such an agent's earlier replies are to the policy: verbatim, the ids it sampled; template, what its chat template makes
    of them now (thoughts dropped, say), where that differs as a further segment."""
    max_turns: Annotated[int, Range(low=1)] = 16
    """Most turns of an episode, or calls of an agent that owns its loop; one that does not end within them is truncated."""
    env_failure: Literal["stop", "drop", "retry"] = "stop"
    """Where an environment or an agent raises, hangs or answers nonsense: stop, the run ends; drop, its prompt's group is dropped,
    with the reason in the ledger; retry, the episode is begun anew, `env_retries` times at most, and then its group is dropped."""
    env_retries: Annotated[int, Range(low=1)] = 2
    """How often one episode is begun anew, where `env_failure` is retry."""


@dataclass(frozen=True, kw_only=True)
class VLLMConfig:
    """The vLLM engines."""

    num_engines: Annotated[int, Range(low=1)] = 1
    """Engines; each serves a part of every step's prompts."""
    tensor_parallel_size: Annotated[int, Range(low=1)] = 1
    """Devices that hold a part of every layer of one engine."""
    pipeline_parallel_size: Annotated[int, Range(low=1)] = 1
    """Parts the layers of one engine are cut into, each with its own devices; more than 1 needs GPUs."""
    enable_prefix_caching: bool = True
    """Compute the beginning that prompts share, such as that of a group's samples, once."""
    quantization: Literal["none", "fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8", "nvfp4_per_token"] = "none"
    """What an engine makes of the weights as it loads them, by vLLM's names; anything but none needs GPUs that have it. The learner's stay
    as they are, so engine and learner differ by it."""
    gpu_memory_utilization: Annotated[float, Range(low=0, high=1, open_low=True)] = 0.9
    """Share of a GPU's memory an engine may take."""
    kv_cache_gib: Annotated[float, Range(low=0, open_low=True)] = 1.0
    """Key-value cache of an engine where there is no GPU [GiB]."""
    enforce_eager: bool = True
    """Skip graph capture and compilation: minutes less at start, slower decoding on a GPU."""
    max_replacements: Annotated[int, Range(low=0)] = 3
    """Engines that died or hung and are replaced in a run; after that the run goes on with fewer, or ends."""
    min_engines: Annotated[int, Range(low=1)] = 1
    """Engines below which the run ends with exit code 7, what was learnt kept."""
    health_timeout_s: Annotated[float, Range(low=0, open_low=True)] = 60.0
    """Deadline of a health probe [s]; an engine that misses it counts as hung and is replaced."""
    enable_sleep: bool = False
    """Free a GPU that engine and learner share (--placement.engine) of the engine's memory while the learner learns."""
    sleep_level: Literal[1, 2] = 1
    """What of an engine sleeps: 1 keeps its weights in host memory, 2 drops them, for they are sent anew after every step."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format the engines compute in, to which weights are turned before they travel; auto: that of ds.param_dtype."""
    sync_backend: Literal["auto", "shared_memory", "file", "ipc", "nccl"] = "auto"
    """How weights travel to the engines; auto: shared_memory without GPUs, ipc on a shared GPU, nccl across GPUs. file, through the
    run's directory, is slow and needs nothing but a file system that all see."""
    sync_delta: bool = False
    """Leave out of an update the layers of which nothing changed (frozen parts); shared_memory only."""
    sync_adapters_only: bool = False
    """Serve the LoRA adapter over the model that the engines started with, and send nothing but the adapter; merged otherwise."""
    sync_timeout_s: Annotated[float, Range(low=0, open_low=True)] = 600.0
    """Deadline of every phase of a weight update [s]: pausing, the handshake, each bucket, loading, resuming, the canary."""
    sync_tolerance: Annotated[float, Range(low=0, open_low=True)] | None = None
    """Largest difference of the canary between engine and learner [nats]; default 1e-3 in fp32, 0.02 in fp16, 0.1 in bf16."""

    @property
    def devices(self) -> int:
        """Devices one engine spans."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The judge."""

    remote_url: str | None = None
    """Rewards, separated by commas: a Python file (FILE.py or FILE.py:function), builtin:math, builtin:gsm8k, builtin:code, or
    the URLs of servers that share the load; without any, the task's own. docs/rewards.md has the signatures and the protocol."""
    weights: str | None = None
    """Weights of several rewards, separated by commas, in their order (all URLs together are one); default 1 each."""
    timeout_s: Annotated[float, Range(low=0, open_low=True)] = 60.0
    """Deadline for judging one response, or for one answer of an environment [s]; whoever misses it ends the run."""
    num_workers: Annotated[int, Range(low=1)] = 2
    """Processes that run each reward function."""
    retry_s: Annotated[float, Range(low=0, open_low=True)] = 180.0
    """How long a request is repeated while a reward server is away or overloaded [s]; then the run ends."""
    rows_per_request: Annotated[int, Range(low=1)] = 16
    """Most responses in one request to a reward server; 1 for a server that judges only one at a time."""
    max_in_flight: Annotated[int, Range(low=1)] = 64
    """Requests to each reward server at a time."""
    allowed_hosts: str | None = None
    """Hosts, separated by commas, to which responses may be sent; without any, those of the URLs, and none that is link-local."""
    on_error: Literal["stop", "drop"] = "stop"
    """Where judging fails (the function raises, hangs or gives no reward; a server is away for longer than `retry_s`): stop, the run
    ends; drop, the prompt's group is dropped, with the reason in the ledger."""
