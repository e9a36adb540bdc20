"""A bounded buffer of groups between the engines, which go on sampling, and the learner, which takes one batch after another.

    room -> begin (a prompt is handed to the engines) -> finish (its group is judged) -> take (the batch of one step)

Versions count updates: step s trains the policy of version s - 1 and makes version s. The lag of a token is s - 1 less the version
that sampled it. A prompt begun while the engines serve version v has no token older than v, so trained in step s it lags by at most
s - 1 - v; the lag stays within `staleness` as long as it is trained by its last step, v + 1 + staleness.

Nothing waits for ever, and nothing is older than that (B = `batch`, a = `ahead`, e = `staleness` >= a; no over-sampling):

- Admission. While version v is served and step t was the last that took its batch, at most (v + 1 + a - t) B groups are open (begun
  and not yet taken or dropped). When step s is next, t = s - 1 and v <= s - 1, so at most (a + 1) B <= (e + 1) B are open.
- Taking. Step s takes the B oldest finished groups, and only if for every d >= s the groups that are left with a last step of at
  most d number at most (d - s) B: as many as the steps after s up to d can take. Else it waits for an older one.
- So before step s, for every d >= s, at most (d - s + 1) B open groups have a last step of at most d. It holds of none; taking makes it
  hold for s + 1; beginning adds groups whose last step is v + 1 + e, the largest so far, of which admission bounds the number: with
  v = s - 1 that is s + e and (e + 1) B. With v = s - 2 (step s - 1 is still being learnt) it is s - 1 + e, and admission leaves at
  most a B <= e B. With d = s: at most B groups are in their last step, and the oldest of them are taken first, so none is missed.

With over-sampling `extra` more groups are open, so that a step need not wait for its slowest: it takes the B oldest finished, and what
has then had its last step is dropped (finished), or given up (in flight), with a reason. The bound holds, at that price.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from hone.rollout.executor import Group
from hone.rollout.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Window:
    """How much may be open, and how old it may be.

    `batch` groups make a step; `ahead` batches may be under way while the learner learns; `staleness` bounds the lag [versions];
    `extra` groups are open beyond what steps will take; no group is begun for a step after `last_step`.
    """

    batch: int
    ahead: int
    staleness: int
    extra: int = 0
    last_step: int | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.ahead < 0 or self.extra < 0:
            raise ValueError(f"a buffer of batches of {self.batch}, {self.ahead} ahead and {self.extra} beyond makes no sense")
        if self.staleness < self.ahead:
            raise ValueError(
                f"with {self.ahead} batches under way while the learner learns, samples become {self.ahead} versions old, and only "
                f"{self.staleness} are allowed; raise rollout.max-staleness or lower train.async-queue-size"
            )


@dataclass(frozen=True, kw_only=True)
class Open:
    """A prompt whose group is under way or waits: the step it was begun for, the version then served, and its place in line."""

    prompt: Prompt
    step: int
    version: int
    place: int


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The groups of one step, oldest first; `stale` are finished ones that this step was the last for, or that came too late for it."""

    groups: list[Group]
    stale: list[Open]
    overtaken: list[Open]
    """In flight although the step they were begun for has its batch."""
    expired: list[Open]
    """In flight and past their last step, whatever becomes of them."""


@dataclass
class Buffer:
    """See the module's text. `version` is what the engines serve, `taken` the last step that took its batch."""

    window: Window
    version: int = 0
    taken: int = 0
    _flying: dict[str, Open] = field(default_factory=dict)
    _finished: dict[str, tuple[Open, Group]] = field(default_factory=dict)
    _places: int = 0

    @property
    def in_flight(self) -> list[Open]:
        """Prompts that the engines or the judge have, oldest first."""
        return sorted(self._flying.values(), key=lambda entry: entry.place)

    @property
    def finished(self) -> list[tuple[Open, Group]]:
        """Groups that wait for a step, oldest first."""
        return sorted(self._finished.values(), key=lambda pair: pair[0].place)

    @property
    def open(self) -> int:
        """Groups begun and neither taken nor dropped."""
        return len(self._flying) + len(self._finished)

    def room(self) -> int:
        """How many more prompts may be begun now."""
        window = self.window
        if self.version + window.staleness < self.taken:
            return 0  # what is begun now would be too old for the next step already
        admitted = (self.version + 1 + window.ahead - self.taken) * window.batch + window.extra
        if window.last_step is not None:
            steps_left = window.last_step - self.taken
            admitted = min(admitted, steps_left * window.batch + window.extra if steps_left > 0 else 0)
        return max(0, admitted - self.open)

    @property
    def beginning_for(self) -> int:
        """The step that the next prompt is begun for: so many groups are open for each step to come."""
        return self.taken + 1 + self.open // (self.window.batch + self.window.extra)

    def begin(self, prompt: Prompt) -> Open:
        """Enter a prompt that is handed to the engines now. Raises ValueError where there is no room, or where it is open already."""
        if self.room() < 1:
            raise ValueError(f"no room for prompt {prompt.prompt_id!r}: {self.open} groups are open")
        if prompt.prompt_id in self._flying or prompt.prompt_id in self._finished:
            raise ValueError(f"prompt {prompt.prompt_id!r} is open already")
        entry = Open(prompt=prompt, step=self.beginning_for, version=self.version, place=self._places)
        self._places += 1
        self._flying[prompt.prompt_id] = entry
        return entry

    def finish(self, group: Group) -> None:
        """A prompt's group is there. Raises KeyError for one that is not in flight."""
        prompt_id = group.prompt.prompt_id
        self._finished[prompt_id] = (self._flying.pop(prompt_id), group)

    def give_up(self, prompt_id: str) -> Open:
        """Take a prompt out that is in flight. Raises KeyError for one that is not."""
        return self._flying.pop(prompt_id)

    def put_back(self, groups: Iterable[Group]) -> None:
        """Finished groups of an earlier run, with the versions that sampled them, before anything is begun."""
        for group in groups:
            entry = Open(prompt=group.prompt, step=self.taken + 1, version=oldest(group), place=self._places)
            self._places += 1
            self._finished[group.prompt.prompt_id] = (entry, group)

    def take(self, *, drained: bool = False) -> Taken | None:
        """The batch of the next step, or None while it has to wait; `drained`: nothing is in flight and nothing more will be begun.

        Drained, a batch is as large as what is left, and may be empty.
        """
        step, window = self.taken + 1, self.window
        chosen = [pair for pair in self.finished if self._last_step(pair[0]) >= step][: window.batch]
        if len(chosen) < window.batch and not drained:
            return None
        ids = {entry.prompt.prompt_id for entry, _ in chosen}
        left = [*self._flying.values(), *(entry for entry, _ in self._finished.values() if entry.prompt.prompt_id not in ids)]
        if not window.extra and not self._in_time(left, step):
            return None
        self.taken = step
        for prompt_id in ids:
            del self._finished[prompt_id]
        past = [entry for entry in left if self._last_step(entry) <= step]
        stale = [entry for entry in past if entry.prompt.prompt_id in self._finished]
        for entry in stale:
            del self._finished[entry.prompt.prompt_id]
        expired = [entry for entry in past if entry.prompt.prompt_id in self._flying]
        overtaken = [entry for entry in self.in_flight if window.extra and entry.step <= step and entry not in expired]
        return Taken(groups=[group for _, group in chosen], stale=stale, overtaken=overtaken, expired=expired)

    def _last_step(self, entry: Open) -> int:
        return entry.version + 1 + self.window.staleness

    def _in_time(self, left: list[Open], step: int) -> bool:
        """Whether later steps can take what this one leaves, each group by its last step."""
        last_steps = sorted(last for entry in left if (last := self._last_step(entry)) >= step)
        return all(count <= (last - step) * self.window.batch for count, last in enumerate(last_steps, start=1))


def oldest(group: Group) -> int:
    """The oldest version that sampled a token of the group."""
    return min(int(part.version[part.action_mask].min()) for sample in group.samples for part in sample.segments)
