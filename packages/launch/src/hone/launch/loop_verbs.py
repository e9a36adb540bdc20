"""The commands that are whole loops over generations; read by the front screen, so nothing heavy is imported here."""

from hone.launch.verbs import Verb

_OWN = """\\
    --model.model-name-or-path DIR --data.prompt-dataset FILE.jsonl \\
    --data.label-key answer --reward.remote-url reward.py"""


def _loop(verb: str, summary: str, story: str, *examples: str) -> Verb:
    """A loop, which has a model and a task of its own to try it on."""
    return Verb(
        section="whole loops over generations",
        summary=summary,
        story=(
            f"{story} Every stage is written down when it is finished: --resume latest goes on after the last one. Without arguments a "
            "small model of its own learns a built-in task."
        ),
        examples=(f"launch {verb}", f"launch {verb} {_OWN}", *examples, f"launch {verb} --resume latest"),
    )


LOOPS = {
    "rejection-sampling": _loop(
        "rejection-sampling",
        "imitate the best of several responses, again and again",
        "Draws several responses to each prompt, has them judged, trains on the best of each prompt as sft does, and begins again with "
        "the model that came of it.",
        "launch rejection-sampling --reward.model-name-or-path RM --model.model-name-or-path DIR --data.prompt-dataset FILE.jsonl",
    ),
    "iterative-dpo": _loop(
        "iterative-dpo",
        "prefer the best of several responses to the worst",
        "Draws several responses to each prompt, has them judged, trains on the best and the worst of each prompt as dpo does, and begins "
        "again with the model that came of it. Prompts whose responses all earned the same are left out and counted.",
        "launch iterative-dpo --loss ipo --ref.follows first",
    ),
    "conditional-sft": _loop(
        "conditional-sft",
        "imitate under prompts that tell the reward",
        "Draws responses, has them judged, and trains on all of them, each under its prompt with its reward in it (--condition.template); "
        "from the second iteration the best reward is asked for.",
        "launch conditional-sft --condition.normalize --condition.template 'reward {reward:.1f}: {input}'",
    ),
}
"""Commands of the loop over generations; their settings are in `loop_config.py`."""
