"""`launch chat`: a conversation with a model in the terminal, streamed as it is drawn."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import transformers
from rich.console import Console

from hone.datasets.config import DataConfig
from hone.datasets.templates import template_errors, template_kwargs, use_template
from hone.datasets.tokenizer import load_tokenizer
from hone.launch.answering import model_of
from hone.launch.chat.engines import Asked, ChatEngine, InThisProcess, Served
from hone.launch.chat.screen import Screen
from hone.launch.chat.talk import Conversation, OpenText, Talk, Words, streamed
from hone.launch.chat_config import ChatConfig
from hone.launch.names import closest
from hone.launch.observe.files import append_line
from hone.launch.plan import stop_ids, vocabulary
from hone.launch.processes import Descendants
from hone.launch.schema import from_text, settings
from hone.learner.errors import ModelError
from hone.learner.model_files import check_model
from hone.learner.roles import DTYPES

HELP = {
    "/help": "this list",
    "/reset": "forget what was said",
    "/system TEXT": "the system message from now on; without a text, show it; `none` takes it away",
    "/again": "another answer to what was said last",
    "/set NAME VALUE": "temperature, top-p, max-new-tokens or seed; without them, show all",
    "/save FILE": "add the conversation to a file, as a row for `launch sft --data.apply-chat-template` (a text: --data.pretrain-mode)",
    "/quit": "end; so does Ctrl-D",
}


def run(config: ChatConfig, sources: Mapping[str, str]) -> int:
    """Talk until there is nothing more to answer; returns the exit code. Raises ModelError, TokenizerError, DataError and EngineError."""
    screen, console = Screen(), Console(stderr=True, highlight=False)
    model = model_of(config, console)
    check_model(model)
    tokenizer = load_tokenizer(model)
    vocabulary({"policy": model}, tokenizer)
    data = config.data
    rendering = DataConfig(tokenizer_chat_template=data.tokenizer_chat_template, chat_template_kwargs=data.chat_template_kwargs)
    use_template(tokenizer, rendering)
    longest = data.max_len or _positions(model)
    raw = config.raw or tokenizer.chat_template is None
    given = template_kwargs(rendering)
    talk = OpenText(tokenizer=tokenizer) if raw else Conversation(tokenizer=tokenizer, given=given, system=config.system)
    with Descendants():
        screen.note(f"loading {model}")
        ends = stop_ids(model, tokenizer)
        with closing(_engine(config, model, longest=longest, ends=ends)) as engine:
            how = "each line goes on with the text, until an answer ends it" if raw else "with its chat template"
            screen.head({"model": model, "engine": config.engine, "talks": how, "context": f"{longest} tokens"})
            if raw and not config.raw:
                screen.note(
                    "this model has no chat template, so what is typed and answered is one text, until an answer ends it; "
                    "--data.tokenizer-chat-template names one\n"
                )
            if raw and config.system is not None:
                screen.note("there is no system message without a chat template: --system has no effect\n", "yellow")
            if screen.watched:
                screen.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends\n")
            Chat(config, talk, engine, screen, longest=longest, ends=ends).go_on()
    return 0


def _engine(config: ChatConfig, model: str, *, longest: int, ends: Sequence[int]) -> ChatEngine:
    if config.engine == "vllm":
        return Served(config, model, max_len=longest, eos_ids=ends)
    import torch

    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    return InThisProcess(model, dtype=DTYPES[config.model.param_dtype], eos_ids=ends)


def _positions(model: str) -> int:
    found = getattr(transformers.AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int):
        raise ModelError(f"{model} does not say how long a conversation it can read; name it with --data.max-len")
    return found


class Chat:
    """The conversation: lines in, commands carried out, everything else answered."""

    def __init__(self, config: ChatConfig, talk: Talk, engine: ChatEngine, screen: Screen, *, longest: int, ends: Collection[int]) -> None:
        self._config, self._talk, self._engine, self._screen = config, talk, engine, screen
        self._longest, self._ends = longest, ends
        self._sampling, self._answers = config.rollout, 0
        self._last: str | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/again": self._again,
            "/set": self._set,
            "/save": self._save,
        }

    def go_on(self) -> None:
        """Until there are no more lines, or /quit."""
        for line in self._screen.lines():
            if not line.startswith("/") or line.startswith("//"):
                self._answer(line.removeprefix("/") if line.startswith("//") else line)
                continue
            name, _, rest = line.partition(" ")
            if name == "/quit":
                return
            if name in self._commands:
                self._commands[name](rest.strip())
                continue
            near = closest(name, [*self._commands, "/quit"])
            mend = f"did you mean {near[0]}?" if near else "/help lists the commands"
            self._screen.note(f"there is no {name}; {mend} (a message that begins with a slash is written with two)", "yellow")

    def _answer(self, text: str) -> None:
        try:
            tokens = self._talk.ask(text)
        except template_errors() as error:
            self._screen.note(f"the chat template refuses this conversation: {error}; /reset or /system none may help", "yellow")
            return
        room = self._longest - len(tokens)
        if not tokens or room < 1:
            what = (
                "nothing to go on from" if not tokens else f"the conversation has {len(tokens)} tokens, and {self._longest} is the longest"
            )
            self._screen.note(f"{what}; /reset forgets what was said", "yellow")
            return
        most = min(self._sampling.max_new_tokens, room)
        self._answers += 1
        ids = self._engine.stream(Asked(tokens=tokens, most=most, sampling=self._sampling, number=self._answers))
        drawn, said, stopped, began = list[int](), list[str](), False, time.monotonic()
        self._screen.begin()
        try:
            for piece in streamed(Words(self._talk.tokenizer), _kept(ids, drawn)):
                said.append(piece)
                self._screen.say(piece)
        except KeyboardInterrupt:
            stopped = True
        finally:
            ids.close()
        rate = f"{len(drawn)} tokens, {len(drawn) / (time.monotonic() - began):.0f} tokens/s"
        cut = not stopped and len(drawn) == most and drawn[-1] not in self._ends
        limit = f"cut at {most} tokens: " + ("/set max-new-tokens allows more" if most < room else "the context is full")
        self._screen.end(f"stopped, {rate}" if stopped else f"{limit}, {rate}" if cut else rate, needed=stopped or cut)
        self._last = text
        ended = bool(drawn) and drawn[-1] in self._ends
        self._talk.keep(text, tokens, "".join(said), drawn[:-1] if ended else drawn, ended=ended)

    def _help(self, rest: str) -> None:
        widest = max(map(len, HELP))
        for name, meaning in HELP.items():
            self._screen.note(f"  {name:<{widest}}  {meaning}")

    def _reset(self, rest: str) -> None:
        self._talk.forget()
        self._last = None
        stays = isinstance(self._talk, Conversation) and self._talk.system
        self._screen.note("forgotten; the system message stays" if stays else "forgotten")

    def _system(self, rest: str) -> None:
        if not isinstance(self._talk, Conversation):
            self._screen.note("there is no system message without a chat template", "yellow")
            return
        if rest:
            self._talk.system = None if rest.lower() == "none" else rest
        self._screen.note(f"system: {self._talk.system}" if self._talk.system else "no system message")

    def _again(self, rest: str) -> None:
        if self._last is None:
            self._screen.note("nothing was said yet", "yellow")
            return
        self._talk.take_back()
        self._answer(self._last)

    def _set(self, rest: str) -> None:
        known = {one.name.partition(".")[2].replace("_", "-"): one for one in settings(self._config).values() if one.group == "rollout"}
        name, _, value = rest.partition(" ")
        name = name.removeprefix("--").replace("_", "-")
        if rest and name not in known:
            near = closest(name, known)
            self._screen.note(f"there is no setting {name}; " + (f"did you mean {near[0]}?" if near else ", ".join(known)), "yellow")
            return
        if rest:
            try:
                field = known[name].name.partition(".")[2]
                self._sampling = replace(self._sampling, **{field: from_text(known[name], value.split())})
            except ValueError as error:
                self._screen.note(f"{name}: {error}", "yellow")
                return
        self._screen.note(", ".join(f"{one} {getattr(self._sampling, one.replace('-', '_')):g}" for one in known))

    def _save(self, rest: str) -> None:
        if (row := self._talk.row()) is None:
            self._screen.note("there is nothing to save", "yellow")
            return
        path = Path(rest or f"chat-{datetime.now():%Y%m%d-%H%M%S}.jsonl").expanduser()
        try:
            append_line(path, row)
        except OSError as error:
            self._screen.note(f"{path} cannot be written: {error.strerror}", "yellow")
            return
        self._screen.note(f"{len(row['messages'])} messages are in {path}" if "messages" in row else f"the text is in {path}")


def _kept(ids: Iterator[Sequence[int]], drawn: list[int]) -> Iterator[Sequence[int]]:
    """The same ids, noted down in `drawn`."""
    for some in ids:
        drawn += some
        yield some
