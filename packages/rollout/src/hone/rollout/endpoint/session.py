"""One episode at the endpoint: its calls are placed in a tree, drawn from the engine within a budget, and taken apart into replies."""

import asyncio
import bisect
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hone.algos.batch import SamplerContract
from hone.rollout.calls import draw
from hone.rollout.endpoint.errors import Refused
from hone.rollout.endpoint.messages import Message, ToolCall
from hone.rollout.endpoint.rendering import Renderer, Tools, refuse_broken
from hone.rollout.endpoint.templates import Served
from hone.rollout.endpoint.tool_calls import PARSERS
from hone.rollout.endpoint.tree import History, Node, Place, Tree
from hone.rollout.errors import EngineError
from hone.rollout.pictures import Placeholders
from hone.rollout.sampling import seed_of
from hone.rollout.types import Completion, Engine, Request


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an episode may use: calls, new tokens of one reply and ids of one conversation [tokens], seconds for one reply [s]."""

    calls: int
    new_tokens: int
    max_len: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request in the form every wire is brought to; `messages` or, for plain text, `prompt`.

    `stops` and `stop_ids` end a reply beside what the run's contract ends it at; `requested` is only recorded. Without `reads_calls`
    tools are shown, and calls of them stay text.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    tools: Tools = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    n: int = 1
    requested: Mapping[str, Any] = field(default_factory=dict)
    reads_calls: bool = True


class Session:
    """An open episode. `contract` has the run's sampling; each draw gets a seed of its own, by its prompt and how often it was drawn.

    An engine that `stops_at_text` is told which texts end the client's replies; what any other drew behind them is cut off.
    `refused` is the code of the last request that was out of budget or context, if no reply was given since; `failure` is set
    when the engine failed, with `error`: what becomes of the agent's and the policy's text is never the engine's failure.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        renderer: Renderer,
        served: Served | None,
        stop_ids: Sequence[int],
        history: History,
        budget: Budget,
        prompt_id: str,
        step: int,
        sample: int,
        run_seed: int,
        contract: SamplerContract,
        greedy: bool,
        stops_at_text: bool = False,
        placeholders: Placeholders | None = None,
    ) -> None:
        self.tree = Tree(served, renderer, stop_ids=stop_ids, history=history, placeholders=placeholders)
        self.prompt_id, self.refused, self.failure = prompt_id, "", asyncio.Event()
        self.error: Exception | None = None
        self._engine, self._renderer, self._served, self._stop_ids = engine, renderer, served, frozenset(stop_ids)
        self._budget, self._contract, self._greedy = budget, contract, greedy
        self._stops_at_text = stops_at_text
        self._origin = (run_seed, step, sample)
        self._drawn: Counter[str] = Counter()
        self._calls = 0

    def placed(self, asked: Asked) -> Place:
        """Where the request belongs. Raises Refused."""
        with self._unserved():
            for stop in asked.stops:
                refuse_broken(stop)
            self._check_ids(asked.stop_ids, "stop_token_ids")
            if asked.prompt is None:
                place = self.tree.place(asked.messages, asked.tools, asked.options)
            else:
                self._check_ids(() if isinstance(asked.prompt, str) else asked.prompt, "prompt")
                place = self.tree.place_text(asked.prompt)
        if not place.prompt:
            raise Refused("the prompt has no tokens; say something", param="prompt" if asked.prompt is not None else "messages")
        return place

    async def answer(self, asked: Asked) -> list[Node]:
        """Draw `asked.n` replies and enter them into the tree. Raises Refused; a failure of the engine ends the session."""
        if self._calls + asked.n > self._budget.calls:
            self._refuse(f"the episode has used its {self._budget.calls} calls (rollout.max-turns)", "budget_exhausted")
        place = self.placed(asked)
        room = self._budget.max_len - len(place.prompt)
        if room < 1:
            self._refuse(
                f"the conversation has {len(place.prompt)} tokens; its context ends at {self._budget.max_len} (data.max-len)",
                "context_length_exceeded",
            )
        self._calls += asked.n
        limit = min(self._budget.new_tokens, room, asked.limit or room)
        with self._unserved():
            requests = [self._request(asked, place, limit) for _ in range(asked.n)]
        drawn = await self._drawn_of(requests)
        with self._unserved():
            nodes = [self._entered(asked, place, request, completion) for request, completion in zip(requests, drawn, strict=True)]
        self.refused = ""
        return nodes

    async def _drawn_of(self, requests: Sequence[Request]) -> list[Completion]:
        """What the engine draws; only its failures end the session, as an EngineError."""
        try:
            return await draw(self._engine, requests, of=[self.prompt_id], timeout_s=self._budget.timeout_s)
        except Exception as error:
            self.error = error
            if not isinstance(error, EngineError):
                what = f"{type(error).__name__} on prompt {self.prompt_id!r}: {error}"
                self.error = EngineError(f"engine {self._engine.name} raised {what}")
                self.error.__cause__ = error
            self.failure.set()
            raise Refused(f"the engine failed: {self.error}", status=500, code="engine_dead") from error

    @contextmanager
    def _unserved(self) -> Iterator[None]:
        """What the text of an agent or of the policy brings to an error is refused, with the error, and counted."""
        try:
            yield
        except Refused:
            raise
        except Exception as error:
            self.tree.counts["request_errors"] += 1
            raise Refused(f"the request cannot be served: {type(error).__name__}: {error}", code="request_error") from error

    def _check_ids(self, ids: Sequence[int], name: str) -> None:
        """Refuse ids that no token has; a model may have drawn ids beyond its tokenizer's, and these may come back."""
        if beyond := {one for one in ids if one > self._renderer.last_id}:
            beyond -= {one for node in self.tree.nodes for one in node.output}
        if beyond:
            raise Refused(f"{name} has the id {max(beyond)}; the vocabulary ends at {self._renderer.last_id}", param=name)

    def _request(self, asked: Asked, place: Place, limit: int) -> Request:
        run_seed, step, sample = self._origin
        read = hashlib.blake2b(str(place.prompt).encode(), digest_size=8)
        for image in place.images:
            read.update(image.data)
        digest = read.hexdigest()
        name = f"{self.prompt_id}@{digest}#{self._drawn[digest]}"
        self._drawn[digest] += 1
        own = self._contract
        ends: dict[str, Any] = {
            "stop": tuple(dict.fromkeys((*own.stop, *(asked.stops if self._stops_at_text else ())))),
            "stop_token_ids": tuple(dict.fromkeys((*own.stop_token_ids, *asked.stop_ids))),
        }
        return Request(
            request_id=f"{step}:{name}:{sample}",
            tokens=place.prompt,
            max_new_tokens=limit,
            contract=dataclasses.replace(own, seed=seed_of(run_seed, step, name, sample), **ends),
            greedy=self._greedy,
            images=place.images,
        )

    def _entered(self, asked: Asked, place: Place, request: Request, completion: Completion) -> Node:
        tokens = completion.tokens
        contract = request.contract
        ended = completion.finish_reason == "stop" and tokens[-1] in {*self._stop_ids, *contract.stop_token_ids}
        text = self._renderer.decoded(tokens[:-1] if ended else tokens, behind=place.prompt)
        kept, finish_reason, requested = len(tokens), completion.finish_reason, dict(asked.requested)
        found = min(((start, stop) for stop in (*contract.stop, *asked.stops) if (start := text.find(stop)) >= 0), default=None)
        if found is not None:
            # As an engine that knows the tokenizer stops by itself: a shorter prefix of a sample is a sample.
            kept = self._first_with(found[1], tokens, place.prompt)
            text, finish_reason, requested["stopped_by"] = text[: found[0]], "stop", found[1]
        reply = self._reply(text, asked, request, cut=finish_reason == "length")
        return self.tree.commit(
            place,
            completion,
            reply=reply,
            text=text,
            contract=contract,
            kept=kept,
            finish_reason=finish_reason,
            requested=requested,
        )

    def _first_with(self, stop: str, tokens: Sequence[int], prompt: Sequence[int]) -> int:
        """How many ids it takes until the stop string is complete."""
        lengths = range(1, len(tokens) + 1)
        return 1 + bisect.bisect_left(lengths, True, key=lambda length: stop in self._renderer.decoded(tokens[:length], behind=prompt))

    def _reply(self, text: str, asked: Asked, request: Request, *, cut: bool) -> Message:
        """What was written as a message: thoughts, words, calls of tools. Calls that cannot be read stay text, and are counted."""
        if asked.prompt is not None:
            return Message(role="assistant", content=text)
        reasoning, content = _thoughts(text, begun=self._renderer.decoded(request.tokens[-4:]).rstrip().endswith("<think>"))
        calls: tuple[ToolCall, ...] = ()
        if asked.tools and asked.reads_calls and self._served is not None and self._served.dialect:
            schemas = {tool["function"]["name"]: _schema(tool["function"]) for tool in asked.tools}
            parsed = PARSERS[self._served.dialect](content, schemas)
            self.tree.counts["tool_parse_errors"] += parsed.errors
            if not (cut and parsed.errors):
                # Mistral's templates take ids of nine letters or digits and no others.
                name = f"{request.contract.seed:016x}"
                form = f"{name[-8:]}{{}}" if self._served.dialect == "mistral" else f"call_{name}_{{}}"
                content = parsed.content
                calls = tuple(ToolCall(id=form.format(index), name=tool, arguments=text) for index, (tool, text) in enumerate(parsed.calls))
        return Message(role="assistant", content=content, reasoning=reasoning, tool_calls=calls)

    def _refuse(self, message: str, code: str) -> None:
        self.refused = code
        raise Refused(message, code=code)


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """What the schema of a tool says of its parameters, where it says it in the form of one."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return {"properties": properties if isinstance(properties, Mapping) else {}}


def _thoughts(text: str, *, begun: bool) -> tuple[str | None, str]:
    """(what was thought, what was said): a thought ends with `</think>`, and may have been `begun` by the prompt."""
    if "</think>" in text:
        thought, _, said = text.partition("</think>")
        return thought.removeprefix("<think>").strip("\n"), said.lstrip("\n")
    if begun or text.lstrip().startswith("<think>"):
        return text.lstrip().removeprefix("<think>").strip("\n"), ""
    return None, text
