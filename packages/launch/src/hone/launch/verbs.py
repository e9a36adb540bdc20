"""The commands there are; read by the front screen, so nothing heavy is imported here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command: the `section` it is listed under, a `summary` of one line, a `story` of two or three, and examples."""

    section: str
    summary: str
    story: str
    examples: tuple[str, ...]


# Broken where a shell goes on reading, so that it can be pasted from a narrow terminal.
_OWN = """\\
    --actor.model-name-or-path DIR --data.prompt-dataset FILE.jsonl \\
    --data.label-key answer --reward.remote-url reward.py"""

VERBS = {
    "ppo": Verb(
        section="reinforcement learning",
        summary="clipped surrogate with a critic (PPO)",
        story=(
            "Samples responses, judges them, and trains the policy on a clipped surrogate whose advantages come from a critic (GAE). "
            "Without arguments it trains a small model of its own on a built-in task."
        ),
        examples=("launch ppo", f"launch ppo {_OWN}", "launch ppo --config run.toml --train.max-steps 10 --print-config"),
    ),
    "grpo": Verb(
        section="reinforcement learning",
        summary="clipped surrogate with group-relative advantages, no critic (GRPO)",
        story=(
            "Samples a group of responses for each prompt and trains the policy on how each compares with its group. "
            "Without arguments it trains a small model of its own on a built-in task."
        ),
        examples=("launch grpo", f"launch grpo {_OWN}", "launch grpo --config run.toml --train.max-steps 10 --print-config"),
    ),
}
