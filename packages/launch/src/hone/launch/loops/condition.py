"""A prompt that tells the reward of its response: the template of conditional fine-tuning. Reference: arXiv 2308.12050."""

import string


def fault(template: str) -> str:
    """What is wrong with a template, and how to mend it behind a semicolon; empty where nothing is."""
    mend = "write for example '{input} <rm_score>: {reward:.2f} '"
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        return f"condition.template {template!r} cannot be read: {error}; {mend}"
    if sorted(set(names)) != ["input", "reward"]:
        found = ", ".join(f"{{{name}}}" for name in names) or "nothing in braces"
        return f"condition.template {template!r} needs {{input}} and {{reward}} and nothing else in braces, and has {found}; {mend}"
    try:
        filled(template, "", 0.5)
    except (ValueError, TypeError) as error:
        return f"condition.template {template!r} has a format that does not apply: {error}; {mend}"
    return ""


def filled(template: str, prompt: str, reward: float) -> str:
    """The text that is learnt and asked; braces within the prompt stand for themselves."""
    return template.format(input=prompt, reward=reward)
