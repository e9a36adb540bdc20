"""A prompt and what answers it, where the answer may be given as the whole conversation, its prompt included."""

from hone.datasets.errors import BadRow, shown
from hone.datasets.labelled import Exchange
from hone.datasets.records import Message


def answered(prompt: str | tuple[Message, ...], answer: str | tuple[Message, ...], line: int) -> Exchange | BadRow:
    """The exchange of a row: of a whole conversation, only what comes behind the prompt is the answer.

    A text prompt is one user message there, which a system message may come before.
    """
    if isinstance(answer, str):
        return Exchange(prompt=prompt, answer=answer)
    asked: tuple[Message, ...] = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    skipped = int(answer[0]["role"] == "system" != asked[0]["role"])
    if _same(answer[skipped : skipped + len(asked)], asked):
        asked, answer = answer[: skipped + len(asked)], answer[skipped + len(asked) :]
    if not any(message["role"] == "assistant" for message in answer):
        return BadRow(what="the assistant says nothing", remedy="give the rows an answer, or delete them", line=line)
    if answer[0]["role"] in ("system", "user"):
        return BadRow(
            what="an answer is a whole conversation that does not begin with the row's prompt",
            remedy="let it begin with the same messages as the prompt, or with the assistant's; or name another column of prompts",
            line=line,
            detail=f"prompt {shown(prompt)}, answer {shown(answer)}",
        )
    return Exchange(prompt=asked, answer=answer)


def _same(messages: tuple[Message, ...], asked: tuple[Message, ...]) -> bool:
    """Whether these are the same messages, but for white space around them."""
    bare = [[(message["role"], _stripped(message["content"])) for message in side] for side in (messages, asked)]
    return bare[0] == bare[1]


def _stripped(content: object) -> object:
    return content.strip() if isinstance(content, str) else content
