"""Rendering: a prompt into the one text that is tokenised, by a chat template, by an input template, or as it stands."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from hone.datasets.config import DataConfig, Templates
from hone.datasets.errors import BadRow, DataError, bad_rows_error, shown
from hone.datasets.records import Message, PromptRow, PromptSet
from hone.datasets.templates import template_errors, template_kwargs, use_template

if TYPE_CHECKING:
    import transformers

SLOT = "{}"
# What a template does with a tool's answer is its own affair (some re-encode it); everything else must reach the policy.
KEPT_ROLES = ("system", "developer", "user", "assistant")
THOUGHTS = ("reasoning_content", "thinking")


def template_problems(config: Templates) -> tuple[str, ...]:
    """What is wrong with the two template settings, one message each; nothing when they are sound. Needs no tokenizer."""
    template = config.input_template
    problems: list[str] = []
    if not config.apply_chat_template:
        named = {
            "--data.tokenizer-chat-template": config.tokenizer_chat_template,
            "--data.chat-template-kwargs": config.chat_template_kwargs,
        }
        told = "has no effect without the chat template; add --data.apply-chat-template"
        problems += [f"{flag} {told}" for flag, value in named.items() if value is not None]
    if template is None:
        return tuple(problems)
    if config.apply_chat_template:
        problems.append("--data.input-template and --data.apply-chat-template exclude one another; drop one of them")
    if template.count(SLOT) != 1:
        problems.append(f"--data.input-template {template!r} has {template.count(SLOT)} places {{}} for the prompt; write exactly one")
    if "\\n" in template:
        # A shell hands "\n" over as two characters; the peers train on them without a word.
        problems.append(
            f"--data.input-template {template!r} holds a backslash and an n; for a line break, quote it as $'...' or set it in a file"
        )
    return tuple(problems)


def render(
    prompts: PromptSet,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    *,
    config: DataConfig,
    processor: "transformers.ProcessorMixin | None" = None,
) -> list[str]:
    """The text of every prompt, in order; an image is what the `processor`'s template writes for one.

    With a chat template, a plain string becomes one user message. Raises TokenizerError when the tokenizer has no chat
    template, DataError for unsound settings (`template_problems`), and one for all rows the template fails on or drops part of.
    """
    texts: list[str] = []
    bad: list[BadRow] = []
    for found in rendered(prompts.rows, tokenizer, config=config, processor=processor):
        (texts if isinstance(found, str) else bad).append(found)  # pyright: ignore[reportArgumentType] - each goes to its own list
    if bad:
        raise bad_rows_error(prompts.name, bad, rows=len(prompts.rows))
    return texts


def rendered(
    rows: Iterable[PromptRow],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    *,
    config: DataConfig,
    processor: "transformers.ProcessorMixin | None" = None,
) -> Iterator[str | BadRow]:
    """The text of each row in order, or everything the template does wrong with it. Raises as `render` does for what is not a row's."""
    problems = template_problems(config)
    if problems:
        raise DataError("\n".join(problems))
    if not config.apply_chat_template:
        yield from (_fill(config.input_template, row.prompt) for row in rows)
        return
    own = processor is None or processor.chat_template is None or config.tokenizer_chat_template is not None
    if own:
        use_template(tokenizer, config)
    renderer = tokenizer if own or processor is None else processor
    given = template_kwargs(config)
    for row in rows:
        text = _apply(row, renderer, given, name=str(tokenizer.name_or_path))
        lost = [] if isinstance(text, BadRow) else _lost_messages(row, text)
        yield from lost or [text]


def template_text(tokenizer: "transformers.PreTrainedTokenizerBase", *, config: Templates) -> str:
    """The template that `render` uses, or an empty text where it uses none."""
    if config.apply_chat_template:
        template = tokenizer.chat_template
        given = template_kwargs(config)
        return (template if isinstance(template, str) else repr(template)) + (json.dumps(given, sort_keys=True) if given else "")
    return config.input_template or ""


def _fill(template: str | None, prompt: object) -> str:
    assert isinstance(prompt, str), "messages are refused without a chat template when the rows are validated"
    # No str.format: a prompt or template may hold braces, and "{0.__class__}" must stay text.
    return prompt if template is None else template.replace(SLOT, prompt)


def _as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _apply(
    row: PromptRow,
    renderer: "transformers.PreTrainedTokenizerBase | transformers.ProcessorMixin",
    given: Mapping[str, Any],
    *,
    name: str,
) -> str | BadRow:
    # The annotation of apply_chat_template knows text values only; templates take any (tool calls are lists).
    messages = cast("list[dict[str, str]]", [dict(message) for message in _as_messages(row.prompt)])
    try:
        text = renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given)
    except template_errors() as error:
        return BadRow(
            what=f"the chat template of {name!r} fails",
            remedy="mend the rows, or put a chat_template.jinja that takes them beside the tokenizer",
            line=row.line,
            detail=f"{type(error).__name__}: {error}; messages {shown(messages)}",
        )
    assert isinstance(text, str)
    return text


def _lost_messages(row: PromptRow, text: str) -> list[BadRow]:
    """Messages whose content does not stand in the rendered text: what the policy would never see."""
    messages = enumerate(_as_messages(row.prompt))
    return [
        lost
        for place, message in messages
        for piece in _texts(message["content"])
        if (lost := _lost(message, piece, text, place, row.line))
    ]


def dropped(message: Message, text: str, *, place: int, answer: bool, line: int) -> BadRow | None:
    """What of a message does not stand in the rendered text; of an `answer` its thoughts must, too, those of earlier ones need not.

    A template may lay out an answer anew: white space counts for nothing.
    """
    if message["role"] == "assistant" and not answer:
        return None
    pieces = _texts(message["content"])
    if answer:
        pieces += [str(message[name]) for name in THOUGHTS if message.get(name)]
    missing = [piece for piece in pieces if piece.strip() not in text]
    bare = "".join(text.split()) if missing else ""
    gone = (piece for piece in missing if "".join(piece.split()) not in bare)
    return next((lost for piece in gone if (lost := _lost(message, piece, text, place, line))), None)


def _lost(message: Message, piece: str, text: str, place: int, line: int) -> BadRow | None:
    content = piece.strip()
    if message["role"] not in KEPT_ROLES or content in text:
        return None
    thoughts = "delete the <think> parts from the rows" if "<think>" in content else "move the text to a role that it keeps"
    return BadRow(
        what="the chat template drops a message, or part of it",
        remedy=f"{thoughts}, or use a template that renders all of it",
        line=line,
        detail=f"message {place} ({message['role']}) is {shown(content)}, rendered {shown(text)}",
    )


def _texts(content: object) -> list[str]:
    """What a message says: its content, or the text parts of it."""
    if content is None:
        return []
    return [str(part["text"]) for part in content if part["type"] == "text"] if isinstance(content, list) else [str(content)]
