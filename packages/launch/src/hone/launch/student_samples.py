"""`launch kd --kd.student-samples`: what the student itself samples, judged token by token by the teacher.

That is what `launch on_policy_distill` does, with engines, weight sync and a teacher of any size that is sharded as the policy is; so
the words are said as that command has them, and it is carried out. Reference: arXiv 2306.13649 (GKD with a student's share of 1), with
the reverse divergence of the tokens that were sampled.
"""

from collections.abc import Sequence

SWITCH = "kd.student_samples"
GROUPS = {"model": "actor", "teacher": "ref"}
"""Groups of `kd` and of the other command."""
NAMES = {"data.dataset": "data.prompt_dataset", "data.dataset_split": "data.prompt_split"}


def asked(words: Sequence[str]) -> bool:
    """Whether the words of `launch kd` ask for it."""
    return any(_name(word) == SWITCH for word in words)


def said(words: Sequence[str]) -> list[str]:
    """The words as `launch on_policy_distill` has them; what it does not know it answers itself."""
    found: list[str] = []
    for word in words:
        if not word.startswith("--"):
            found.append(word)
            continue
        _, equals, value = word.partition("=")
        name = _name(word)
        if name == SWITCH:
            continue
        group, dot, last = name.partition(".")
        other = NAMES.get(name, f"{GROUPS.get(group, group)}{dot}{last}")
        found.append(f"--{other.replace('_', '-')}{equals}{value}")
    return found


def with_teacher(words: Sequence[str]) -> list[str]:
    """The words with the built-in teacher, where neither a student nor a teacher nor prompts are named; it is made now, the first time."""
    names = {_name(word) for word in words}
    if names & {"ref.model_name_or_path", "actor.model_name_or_path", "data.prompt_dataset", "config", "help", "print_config"}:
        return list(words)
    from rich.console import Console

    from hone.launch.programs.conduct import built_in
    from hone.launch.programs.offline import BUILT_IN_TEACHER

    teacher = built_in(Console(stderr=True, highlight=False), BUILT_IN_TEACHER, what="teacher")
    return [*words, "--ref.model-name-or-path", str(teacher)]


def _name(word: str) -> str:
    return word.partition("=")[0].removeprefix("--").replace("-", "_") if word.startswith("--") else ""
