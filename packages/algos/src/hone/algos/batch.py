"""The stages of the data: Trajectory (one sampled segment) -> Batch (packed rows) -> Scored (judged; the only type a policy loss takes).

All but the first are `Packed`, as are the labelled rows that offline algorithms learn from (`offline.py`).

Shapes: T packed tokens, N sequences (rows), P prompts, n samples per prompt. Rows lie end to end in `[T]`; row i is
`[cu_seqlens[i], cu_seqlens[i + 1])`. Everything is aligned with its own token: `logp[t]` is the log-probability [nats]
of `tokens[t]` given what stands before it in its row (a row's first token has none), `values[t]` the value of the state
before `tokens[t]`. Entries where `action_mask` is False carry no meaning; no function may let them change a result.
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.checks import Spec, check_arguments, check_offsets, checked, specs_of


@checked
def rows_of_tokens(cu_seqlens: Int[Tensor, " N_plus_1"]) -> Int[Tensor, " T"]:
    """Index of the row each packed token belongs to."""
    rows = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(rows, cu_seqlens.diff().long())


@dataclass(frozen=True, kw_only=True)
class SamplerContract:
    """How a sample was drawn; the learner recomputes log-probabilities under exactly this, or refuses.

    `top_k` 0, `top_p` 1 and `min_p` 0 mean no truncation, penalties of 0 (and a `repetition_penalty` of 1) none. Before `min_tokens`
    nothing that ends a response can be drawn. `stop` and `stop_token_ids` end it beside the model's own end of sequence.
    `structured_outputs` is the grammar it is held to, a JSON object of one entry in vLLM's words ("" none). `engine` names the
    engine and its version; `tokenizer` and `template` are hashes (empty where none was used).
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    engine: str
    tokenizer: str
    template: str
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    structured_outputs: str = ""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; log-probabilities need one above 0")

    @property
    def reshaped(self) -> dict[str, object]:
        """What makes the distribution sampled from another than softmax(logits / temperature), by name: no learner recomputes it."""
        return {name: value for name, plain in _PLAIN.items() if (value := getattr(self, name)) != plain}


_PLAIN: dict[str, object] = {
    **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_tokens": 0, "structured_outputs": ""},
    **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
}


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """What `count` tokens of a row, from its token `start` on, stand for: an image, say, as the bytes of a file.

    It is carried with its row to whoever runs the model; nothing here looks into `data`.
    """

    start: int
    count: int
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One sampled segment: what the policy saw and what it chose, as it was sampled (never tokenised twice).

    `rewards` is sparse: a turn's reward stands on its last action token. `version` is the policy version that was
    serving when the token was fed or sampled. `score` is the ungraded quality in [0, 1] used for filters and metrics.
    `segment` counts the segments of one episode from 0 (its history was rewritten, or it branched); each carries the episode's reward.
    """

    prompt_id: str
    sample: int
    tokens: Int[Tensor, " T"]
    action_mask: Bool[Tensor, " T"]
    rollout_logp: Float[Tensor, " T"]
    rewards: Float[Tensor, " T"]
    version: Int[Tensor, " T"]
    truncated: bool
    score: float
    contract: SamplerContract
    attached: tuple[Attachment, ...] = ()
    segment: int = 0


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows of tokens lying end to end. `ref_logp` is filled by the learner where an algorithm's `needs` asks for it.

    `attached` has a tuple of Attachments for each row, or no entry at all where no row has any.
    """

    # Fields with one entry per row; tensors without an axis belong to the whole step; all others have one entry per token.
    PER_ROW: ClassVar[frozenset[str]] = frozenset()
    # Neighbouring rows that mean nothing without each other.
    ROWS_TOGETHER: ClassVar[int] = 1

    tokens: Int[Tensor, " T"]
    cu_seqlens: Int[Tensor, " N_plus_1"]
    position_ids: Int[Tensor, " T"]
    action_mask: Bool[Tensor, " T"]
    temperature: float = 1.0
    ref_logp: Float[Tensor, " T"] | None = None
    # Not tuple[tuple[Attachment, ...], ...]: tests check annotations by looking at random items, which hypothesis forbids.
    attached: tuple[typing.Any, ...] = ()

    def __post_init__(self) -> None:
        stage = type(self).__name__
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        check_arguments(stage, _specs(type(self)), tensors)
        check_offsets(stage, self.cu_seqlens, tokens=self.tokens.shape[0])
        if self.attached and len(self.attached) != self.rows:
            raise ValueError(
                f"{stage}: attached has {len(self.attached)} entries for {self.rows} rows; give one for each row, or none at all"
            )

    @property
    def rows(self) -> int:
        """Number of sequences N."""
        return self.cu_seqlens.numel() - 1

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """Tokens of each row."""
        return self.cu_seqlens.diff()

    @property
    def row_of_token(self) -> Int[Tensor, " T"]:
        """Index of the row each token belongs to."""
        return rows_of_tokens(self.cu_seqlens)

    def require(self, name: str) -> Tensor:
        """The field `name`, or a ValueError that says who fills it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the batch has no {name}; {FILLED_BY[name]} fills it when the algorithm's `needs` contains {name!r}")
        return value


FILLED_BY = {
    "old_logp": "the learner",
    "ref_logp": "the learner",
    "values": "the learner",
    "greedy_scores": "`with_greedy`",
    "anchor": "`with_anchor`",
}


@dataclass(frozen=True, kw_only=True)
class Batch(Packed):
    """Sampled rows, nothing judged yet.

    `group[i]` is the index of row i's prompt within the batch. `old_logp`, `ref_logp` and `values` are filled by the
    learner when an algorithm's `needs` asks for them, `greedy_scores` (of the prompt's greedy response, for every row) by
    `with_greedy`; reading one that is missing is an error (`require`). Neighbouring rows with one number in `episode` are
    segments of one episode, each with the episode's reward: together they count as one sample. None: every row is its own.
    """

    PER_ROW: ClassVar[frozenset[str]] = frozenset({"group", "truncated", "greedy_scores", "episode"})

    rollout_logp: Float[Tensor, " T"]
    rewards: Float[Tensor, " T"]
    version: Int[Tensor, " T"]
    group: Int[Tensor, " N"]
    truncated: Bool[Tensor, " N"]
    old_logp: Float[Tensor, " T"] | None = None
    values: Float[Tensor, " T"] | None = None
    greedy_scores: Float[Tensor, " N"] | None = None
    episode: Int[Tensor, " N"] | None = None

    @property
    def episode_rows(self) -> Int[Tensor, " E_plus_1"]:
        """Offsets of the episodes' rows: episode e is rows `[episode_rows[e], episode_rows[e + 1])`."""
        if self.episode is None:
            return torch.arange(self.rows + 1)
        first = torch.ones(self.rows, dtype=torch.bool)
        first[1:] = self.episode[1:] != self.episode[:-1]
        return torch.cat([first.nonzero().flatten(), torch.tensor([self.rows])])

    @property
    def episode_cu_seqlens(self) -> Int[Tensor, " E_plus_1"]:
        """Offsets of the episodes' tokens, as `cu_seqlens` are those of the rows."""
        return self.cu_seqlens if self.episode is None else self.cu_seqlens[self.episode_rows]

    @property
    def episode_group(self) -> Int[Tensor, " E"]:
        """Group of each episode."""
        return self.group if self.episode is None else self.group[self.episode_rows[:-1]]

    @property
    def rewards_once(self) -> Float[Tensor, " T"]:
        """Rewards without the copies that an episode's earlier segments carry."""
        if self.episode is None:
            return self.rewards
        last = torch.zeros(self.rows, dtype=torch.bool)
        last[self.episode_rows[1:] - 1] = True
        return torch.where(last[self.row_of_token], self.rewards, 0.0)


@dataclass(frozen=True, kw_only=True)
class Scored(Batch):
    """A judged batch: every action token has an advantage and a weight; `returns` are the critic's targets, if any.

    `figures` tell of the whole rollout, whatever part of it this is: how far engine and learner are apart, how many groups
    taught nothing (`judge`).
    """

    advantages: Float[Tensor, " T"]
    weights: Float[Tensor, " T"]
    returns: Float[Tensor, " T"] | None = None
    figures: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


@functools.cache
def _specs(stage: type[Packed]) -> dict[str, Spec]:
    return specs_of(typing.get_type_hints(stage))


AnyPacked = TypeVar("AnyPacked", bound=Packed)


def pack(trajectories: Sequence[Trajectory]) -> Batch:
    """Trajectories end to end, in the order given; rows with the same `prompt_id` form a group, segments from 0 up an episode.

    Raises ValueError for an empty list, for trajectories drawn at different temperatures or otherwise than the learner can recompute,
    or a segment behind another episode's.
    """
    if not trajectories:
        raise ValueError("no trajectories to pack: every prompt of the step was dropped")
    for reshaped in (trajectory.contract.reshaped for trajectory in trajectories):
        if reshaped:
            told = ", ".join(f"{name} {value}" for name, value in reshaped.items())
            raise ValueError(
                f"trajectories sampled with {told} cannot be trained on: the learner's log-probabilities know the temperature alone"
            )
    temperatures = {trajectory.contract.temperature for trajectory in trajectories}
    if len(temperatures) > 1:
        raise ValueError(f"trajectories sampled at different temperatures {sorted(temperatures)} cannot share a batch")
    for place, after in enumerate(trajectories):
        before = trajectories[max(place - 1, 0)]
        expected = (after.prompt_id, after.sample, after.segment - 1)
        if after.segment and (before.prompt_id, before.sample, before.segment) != expected:
            raise ValueError(
                f"segment {after.segment} of sample {after.sample} of {after.prompt_id!r} does not stand behind the one before it"
            )
    whole = all(trajectory.segment == 0 for trajectory in trajectories)
    lengths = [trajectory.tokens.numel() for trajectory in trajectories]
    group_of = {prompt_id: index for index, prompt_id in enumerate(dict.fromkeys(t.prompt_id for t in trajectories))}
    return Batch(
        tokens=torch.cat([t.tokens.long() for t in trajectories]),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        action_mask=torch.cat([t.action_mask for t in trajectories]),
        rollout_logp=torch.cat([t.rollout_logp.float() for t in trajectories]),
        rewards=torch.cat([t.rewards.float() for t in trajectories]),
        version=torch.cat([t.version.long() for t in trajectories]),
        group=torch.tensor([group_of[t.prompt_id] for t in trajectories]),
        truncated=torch.tensor([t.truncated for t in trajectories]),
        temperature=temperatures.pop(),
        attached=tuple(t.attached for t in trajectories) if any(t.attached for t in trajectories) else (),
        episode=None if whole else torch.tensor([t.segment == 0 for t in trajectories]).cumsum(0) - 1,
    )


def select(batch: AnyPacked, rows: Sequence[int]) -> AnyPacked:
    """The given rows, in the given order, as a batch of the same stage (weights are taken along unchanged).

    Raises ValueError for rows that part what belongs together, such as a pair.
    """
    together = batch.ROWS_TOGETHER
    wanted = [first + place for first in rows[::together] for place in range(together)]
    if list(rows) != wanted or any(first % together for first in rows[::together]):
        raise ValueError(
            f"the {len(rows)} rows part {type(batch).__name__}; take {together} neighbours at a time, from a multiple of {together}"
        )
    row_index = torch.tensor(list(rows), dtype=torch.long)
    cu_seqlens = torch.tensor([0, *accumulate(int(length) for length in batch.lengths[row_index])], dtype=torch.int32)
    shift = batch.cu_seqlens[row_index] - cu_seqlens[:-1]
    index = torch.arange(int(cu_seqlens[-1])) + shift[rows_of_tokens(cu_seqlens)]
    changes: dict[str, typing.Any] = {"cu_seqlens": cu_seqlens}
    if batch.attached:
        changes["attached"] = tuple(batch.attached[row] for row in rows)
    for name in (one.name for one in dataclasses.fields(batch)):
        value = getattr(batch, name)
        if isinstance(value, Tensor) and value.dim() > 0 and name != "cu_seqlens":
            changes[name] = value[row_index] if name in batch.PER_ROW else value[index]
    return dataclasses.replace(batch, **changes)
