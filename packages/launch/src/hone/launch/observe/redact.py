"""Secrets stay in the environment: what looks like one is struck out before a text is written down.

Struck out are the values of environment variables whose names say secret, the user part of URLs, secrets in query
strings, well-known token shapes, and the value that follows a flag whose name says secret.
"""

import os
import re
from collections.abc import Mapping, Sequence

STRUCK = "***"
_NAME = re.compile(
    r"(^|[-_.])(api[-_]?key|access[-_]?key|private[-_]?key|wandb[-_.]key|token|password|passwd|secret|credentials?|bearer)$", re.I
)
_URL_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_URL_QUERY = re.compile(r"(?<=[?&])((?:[\w-]*[-_])?(?:token|key|secret|password|signature|sig)=)[^&\s#]+", re.I)
_SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b|(?<=Bearer )\S+")
# A shorter value is a word like "true" or "1"; striking it out everywhere would mangle the text and protect nothing.
_SHORTEST = 8


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` without secrets; `environment` is the process's own where none is given."""
    values = os.environ if environment is None else environment
    for value in sorted((v for name, v in values.items() if _NAME.search(name) and len(v) >= _SHORTEST), key=len, reverse=True):
        text = text.replace(value, STRUCK)
    return _SHAPES.sub(STRUCK, _URL_QUERY.sub(rf"\g<1>{STRUCK}", _URL_USER.sub(STRUCK, text)))


def redact_command(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """A command line without secrets, argument by argument (`--x.api-key v` and `--x.api-key=v`)."""
    shown: list[str] = []
    value_is_secret = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if value_is_secret and not argument.startswith("--"):
            shown.append(STRUCK)
        elif equals and name.startswith("--") and _NAME.search(name):
            shown.append(f"{name}={STRUCK}")
        else:
            shown.append(redact(argument, environment))
        value_is_secret = argument.startswith("--") and not equals and _NAME.search(argument) is not None
    return shown
