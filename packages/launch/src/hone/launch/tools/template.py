"""`launch template check MODEL`: what a model's chat template does to sample conversations."""

from collections.abc import Sequence
from dataclasses import replace

from hone.launch.errors import Problem, UsageError

USAGE = "launch template check MODEL [--data.tokenizer-chat-template FILE|NAME] [--data.chat-template-kwargs JSON]"
FLAGS = {"--data.tokenizer-chat-template": "tokenizer_chat_template", "--data.chat-template-kwargs": "chat_template_kwargs"}
FOUND_BAD = 3


def run(words: Sequence[str]) -> int:
    """Check; returns 0, or 3 where something would spoil training. Raises UsageError, TokenizerError, DataError."""
    model, settings = read([word for word in words if word != "--debug"])
    from hone.datasets.offline_config import SFTData
    from hone.datasets.template_check import checks
    from hone.datasets.tokenizer import load_tokenizer

    found = list(checks(load_tokenizer(model), replace(SFTData(apply_chat_template=True), **settings)))
    widest = max(len(check.name) for check in found)
    for check in found:
        print(f"{'BAD' if check.bad else 'ok ':3}  {check.name:{widest}}  {check.told}")
    return FOUND_BAD if any(check.bad for check in found) else 0


def read(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The model and the settings behind the verb. Raises UsageError with everything wrong with them."""
    places: list[str] = []
    settings: dict[str, str] = {}
    problems: list[Problem] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if not word.startswith("-"):
            places.append(word)
        elif name not in FLAGS:
            problems.append(Problem(what=f"unknown option {name}", mend=USAGE, where="command line"))
        elif not equals and not rest:
            problems.append(Problem(what=f"{name} takes a value", mend=USAGE, where="command line"))
        else:
            settings[FLAGS[name]] = value if equals else rest.pop(0)
    if places[:1] != ["check"] or len(places) != 2:
        problems.append(Problem(what=f"`check` and a model, not {' '.join(places) or 'nothing'}", mend=USAGE, where="command line"))
    if problems:
        raise UsageError(problems)
    return places[1], settings
