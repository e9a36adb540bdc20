"""The calls of one episode as a tree: a call is found by its messages, continued by its ids, and exported by segment.

A node is one call of the engine. Its prompt begins with its parent's prompt and output, id for id; only what was said since is
rendered. A history that the agent rewrote begins a further segment. Nothing here knows HTTP or an engine.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hone.algos.batch import Attachment, SamplerContract
from hone.rollout.endpoint.errors import Refused
from hone.rollout.endpoint.messages import Message, likeness
from hone.rollout.endpoint.rendering import CannotAppend, Renderer, Tail, Tools
from hone.rollout.endpoint.templates import Served
from hone.rollout.pictures import Placeholders, collapsed, encoded
from hone.rollout.types import Completion

How = Literal["root", "append", "rerender"]
History = Literal["verbatim", "template"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a call belongs: behind `parent` (or at a root), with these ids before it.

    `heard` are the messages so far (empty where plain text was completed: then `text` is the prompt), `images` those in the prompt,
    `reason` why it does not simply follow. `boundary`: the parent's last sampled id does not stand in `prompt`; the template closes a
    reply otherwise.
    """

    parent: "Node | None"
    prompt: tuple[int, ...]
    how: How
    reason: str = ""
    heard: tuple[Message, ...] = ()
    text: str | None = None
    key: str = ""
    boundary: bool = False
    respelled: bool = False
    images: tuple[Attachment, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Node:
    """One call and what was sampled; `stopped` where its last id is one that ends a reply. `requested` is what the client asked for."""

    index: int
    place: Place
    output: tuple[int, ...]
    logp: tuple[float, ...]
    version: tuple[int, ...]
    finish_reason: str
    stopped: bool
    reply: Message
    text: str
    contract: SamplerContract
    cached_tokens: int = 0
    requested: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and output."""
        return self.place.prompt + self.output

    @property
    def path(self) -> "list[Node]":
        """From the root to this node."""
        above: list[Node] = [] if self.place.parent is None else self.place.parent.path
        return [*above, self]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A root-to-leaf path as one row: ids, which of them are trained on here, their log-probabilities and versions, and its images."""

    nodes: tuple[Node, ...]
    tokens: tuple[int, ...]
    mask: tuple[bool, ...]
    logp: tuple[float, ...]
    version: tuple[int, ...]
    images: tuple[Attachment, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where every sampled id went: sampled = trained + the masked and the dropped of every reason."""

    sampled: int
    trained: int
    masked: Mapping[str, int]
    dropped: Mapping[str, int]

    @property
    def balanced(self) -> bool:
        """Whether every id is accounted for once."""
        return self.sampled == self.trained + sum(self.masked.values()) + sum(self.dropped.values())


class Tree:
    """The calls of one episode. `served` is the chat template (None: only plain text), `history` whether replies stay as they were
    sampled (verbatim) or as the template would render them now; `counts` tells how calls were placed and what was odd.
    Without `placeholders` the policy reads text only.
    """

    def __init__(
        self,
        served: Served | None,
        renderer: Renderer,
        *,
        stop_ids: Sequence[int],
        history: History = "verbatim",
        placeholders: Placeholders | None = None,
    ) -> None:
        self.nodes: list[Node] = []
        self.counts: Counter[str] = Counter()
        self._served, self._renderer, self._stop_ids, self._history = served, renderer, frozenset(stop_ids), history
        self._placeholders = placeholders
        self._delivered: set[int] = set()
        self._dropped: Counter[str] = Counter()

    def place(self, messages: Sequence[Message], tools: Tools, options: Mapping[str, Any]) -> Place:
        """Where a chat request belongs, and the ids the policy reads. Raises Refused."""
        if self._served is None:
            raise Refused("the policy's tokenizer has no chat template; ask /v1/completions", code="no_chat_template")
        if tools and self._served.tools:
            raise Refused(f"tools cannot be served: {self._served.tools}", code="tools_unsupported", param="tools")
        if self._placeholders is None and (shown := [one.where for message in messages for one in message.images]):
            raise Refused(
                f"{shown[0]} cannot be shown: the policy reads text only; leave images out, or train a vision-language model",
                code="unsupported_content",
                param="messages",
            )
        key = hashlib.blake2b(json.dumps([list(tools), dict(options)], sort_keys=True).encode(), digest_size=16).hexdigest()
        found = self._longest_match(messages, key)
        if found is None:
            return self._anew(tuple(messages), tools, options, key, self._why_root(key))
        parent, respelled = found
        said = messages[len(parent.place.heard) + 1 :]
        heard = (*parent.place.heard, parent.reply, *said)
        ordered = _in_call_order(said, parent.reply)
        to_tools = bool(parent.reply.tool_calls) or any(message.role == "tool" for message in said)
        reason = self._served.append_tools if to_tools else self._served.append_users
        if not reason:
            try:
                before = {"before": parent.place.heard} if any(message.images for message in ordered) else {}
                tail = self._renderer.tail(parent.reply, ordered, tools, options, **before)
            except CannotAppend as error:
                reason = str(error)
            else:
                place = self._behind(parent, tail, ordered)
                if self._history == "template":
                    whole = self._renderer.whole((*parent.place.heard, parent.reply, *ordered), tools, options)[1]
                    same = self._renderer.decoded(collapsed(place.prompt, place.images)) == whole
                    reason = "" if same else "the template rewrites what was said"
                if not reason:
                    return replace(place, heard=heard, key=key, respelled=respelled)
        return self._anew((*parent.place.heard, parent.reply, *ordered), tools, options, key, reason, heard=heard)

    def place_text(self, prompt: str | Sequence[int]) -> Place:
        """Where a completion of plain text (or of ids) belongs: behind the longest text it begins with. Raises Refused."""
        if not isinstance(prompt, str):
            ids = tuple(prompt)
            return replace(self._by_ids(ids, reason=""), text=self._renderer.decoded(ids), key="text")
        said = [node for node in self.nodes if node.place.text is not None and prompt.startswith(node.place.text + node.text)]
        if not said:
            ids = self._renderer.ids(prompt, special=True)
            return Place(parent=None, prompt=ids, how="root", reason=self._why_root("text"), text=prompt, key="text")
        parent = max(said, key=lambda node: (len(node.place.text or "") + len(node.text), node.index))
        rest = prompt[len(parent.place.text or "") + len(parent.text) :]
        # The client never saw the id that ended the reply, and goes on without it.
        base, new = (parent.ids[:-1] if parent.stopped else parent.ids), self._renderer.ids(rest) if rest else ()
        place = Place(parent=parent, prompt=base + new, how="append", text=prompt, key="text", boundary=parent.stopped)
        return replace(place, images=parent.place.images)

    def commit(
        self,
        place: Place,
        completion: Completion,
        *,
        reply: Message,
        text: str,
        contract: SamplerContract,
        kept: int,
        finish_reason: str,
        requested: Mapping[str, Any],
    ) -> Node:
        """Enter what was sampled; of its ids the first `kept` count, the rest was drawn in vain behind a stop string."""
        output = completion.tokens[:kept]
        self._dropped["stop_string"] += len(completion.tokens) - kept
        node = Node(
            index=len(self.nodes),
            place=place,
            output=output,
            logp=completion.logp[:kept],
            version=completion.version[:kept],
            finish_reason=finish_reason,
            stopped=kept == len(completion.tokens) and completion.finish_reason == "stop" and output[-1] in self._stop_ids,
            reply=reply,
            text=text,
            contract=contract,
            cached_tokens=completion.cached_tokens,
            requested=dict(requested),
        )
        where = (place.prompt, place.images)
        again = any(other.place.parent is place.parent and (other.place.prompt, other.place.images) == where for other in self.nodes)
        self.counts.update([f"calls_{'resample' if again else place.how}", *(["respelled"] if place.respelled else [])])
        self.nodes.append(node)
        return node

    def deliver(self, node: Node) -> None:
        """The client has read this node's reply; one nobody read is not trained on, unless something follows it."""
        self._delivered.add(node.index)

    def segments(self) -> tuple[list[Segment], Ledger]:
        """The rows of the episode in the order their last replies were given, and where every sampled id went."""
        kept = {above.index for node in self.nodes if node.index in self._delivered for above in node.path}
        inner = {node.place.parent.index for node in self.nodes if node.index in kept and node.place.parent is not None}
        owned: set[int] = set()
        masked: Counter[str] = Counter()
        segments = [self._segment(node, owned, masked) for node in self.nodes if node.index in kept - inner]
        dropped = Counter(self._dropped)
        dropped["undelivered"] += sum(len(node.output) for node in self.nodes if node.index not in kept)
        ledger = Ledger(
            sampled=sum(len(node.output) for node in self.nodes) + self._dropped["stop_string"],
            trained=sum(sum(segment.mask) for segment in segments),
            masked={reason: count for reason, count in masked.items() if count},
            dropped={reason: count for reason, count in dropped.items() if count},
        )
        assert ledger.balanced, f"ids are lost or counted twice: {ledger}"
        return segments, ledger

    def _segment(self, leaf: Node, owned: set[int], masked: Counter[str]) -> Segment:
        """The path to `leaf`; a node that an earlier segment trains is only read here."""
        path, tokens = leaf.path, leaf.ids
        mask, logp, version = [False] * len(tokens), [0.0] * len(tokens), [-1] * len(tokens)
        for node, after in zip(path, [*path[1:], None], strict=True):
            start, read = len(node.place.prompt), len(node.output) - (after is not None and after.place.boundary)
            assert tokens[start : start + read] == node.output[:read], f"what was sampled at {start} does not stand in its segment"
            version[start : start + read] = node.version[:read]
            if node.index not in owned:
                mask[start : start + read] = [True] * read
                logp[start : start + read] = node.logp[:read]
                masked["boundary"] += len(node.output) - read
            owned.add(node.index)
        # What was not sampled was fed to the version that sampled the next.
        for place in range(len(tokens) - 2, -1, -1):
            version[place] = version[place + 1] if version[place] < 0 else version[place]
        return Segment(
            nodes=tuple(path), tokens=tokens, mask=tuple(mask), logp=tuple(logp), version=tuple(version), images=leaf.place.images
        )

    def _longest_match(self, messages: Sequence[Message], key: str) -> tuple[Node, bool] | None:
        """The node whose conversation this one goes on from, and whether an assistant's message was spelled differently."""
        for node in sorted(self.nodes, key=lambda node: (-len(node.place.heard), -node.index)):
            spoken = (*node.place.heard, node.reply)
            said = messages[len(spoken) :]
            if not node.place.heard or node.place.key != key or not said or any(message.role == "assistant" for message in said):
                continue
            alike = [likeness(ours, theirs) for ours, theirs in zip(spoken, messages, strict=False)]
            if None not in alike:
                return node, "respelled" in alike
        return None

    def _behind(self, parent: Node, tail: Tail, said: Sequence[Message]) -> Place:
        base, rest, boundary = parent.ids, tail.ids, False
        if parent.stopped and parent.output[-1] == tail.ids[0]:
            rest = tail.ids[1:]
        elif parent.stopped:
            base, boundary = parent.ids[:-1], True
        new, images = self._seen(rest, said, start=len(base))
        return Place(parent=parent, prompt=base + new, how="append", boundary=boundary, images=parent.place.images + images)

    def _seen(self, ids: tuple[int, ...], messages: Sequence[Message], *, start: int) -> tuple[tuple[int, ...], tuple[Attachment, ...]]:
        """Rendered ids with every placeholder of the messages' images, and the images with their places in a row where the ids are at
        `start`. Raises Refused for what is no image, and a template that shows another number of them.
        """
        if self._placeholders is None:
            return ids, ()
        files: list[bytes] = []
        for shown in (one for message in messages for one in message.images):
            try:
                files.append(encoded(shown.data))
            except ValueError as error:
                raise Refused(f"{shown.where} is {error}; send a PNG or JPEG", code="unsupported_content", param="messages") from error
        try:
            tokens, images = self._placeholders.expanded(ids, files, start=start)
        except ValueError as error:
            raise Refused(f"the messages cannot be shown: {error}", code="unsupported_content", param="messages") from error
        return tuple(tokens), tuple(images)

    def _anew(
        self,
        messages: tuple[Message, ...],
        tools: Tools,
        options: Mapping[str, Any],
        key: str,
        reason: str,
        *,
        heard: tuple[Message, ...] | None = None,
    ) -> Place:
        """The whole conversation rendered; where that begins with ids that were sampled, they keep their place."""
        ids, _ = self._renderer.whole(messages, tools, options)
        prompt, images = self._seen(ids, messages, start=0)
        place = self._by_ids(prompt, images, reason=reason)
        return replace(place, heard=messages if heard is None else heard, key=key)

    def _by_ids(self, ids: tuple[int, ...], images: tuple[Attachment, ...] | None = None, *, reason: str) -> Place:
        """Behind the longest row that the ids begin with, and that shows the same images; None: whichever it shows."""
        above = [node for node in self.nodes if len(node.ids) < len(ids) and ids[: len(node.ids)] == node.ids]
        if images is not None:
            # Other images of the same sizes have the same ids.
            above = [node for node in above if node.place.images == tuple(one for one in images if one.start < len(node.ids))]
        if not above:
            return Place(parent=None, prompt=ids, how="root", reason=reason, images=images or ())
        parent = max(above, key=lambda node: (len(node.ids), node.index))
        shown = parent.place.images if images is None else images
        return Place(parent=parent, prompt=ids, how="rerender", reason=reason, images=shown)

    def _why_root(self, key: str) -> str:
        if not self.nodes:
            return "first"
        return "history" if any(node.place.key == key for node in self.nodes) else "tools"


def _in_call_order(said: Sequence[Message], reply: Message) -> list[Message]:
    """Answers of tools in the order of the calls they answer, whatever order they came in. Raises Refused for one without a call."""
    order = {call.id: index for index, call in enumerate(reply.tool_calls)}
    leading = next((index for index, message in enumerate(said) if message.role != "tool"), len(said))
    for message in said:
        if message.role == "tool" and message.tool_call_id is not None and message.tool_call_id not in order:
            raise Refused(
                f"tool_call_id {message.tool_call_id!r} answers no call of the last reply ({', '.join(map(str, order)) or 'none'})",
                code="tool_call_id_unknown",
                param="messages",
            )
    return [*sorted(said[:leading], key=lambda message: order.get(message.tool_call_id, len(order))), *said[leading:]]
