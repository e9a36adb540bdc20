"""Recipes: named sets of settings for a kind of machine, laid between the defaults and what the user says."""

from collections.abc import Collection, Mapping

RECIPES: dict[str, dict[str, object]] = {
    "none": {},
    "laptop": {
        "rollout.batch_size": 32,
        "rollout.n_samples_per_prompt": 8,
        "rollout.max_new_tokens": 64,
        "train.batch_size": 256,
        "train.max_steps": 40,
        "data.max_len": 512,
        "ds.param_dtype": "fp32",
        "ds.zero_stage": 2,
        "actor.adam.lr": 3e-4,
        "critic.adam.lr": 1e-3,
    },
}
"""Values by dotted name; one a verb does not have (a critic's, for most) is left out."""

BUILT_IN: dict[str, dict[str, object]] = {
    "laptop": {
        # An answer is a sign, two digits and the end.
        "rollout.max_new_tokens": 8,
        # A model this small gains nothing from a second thread, and waits for it whenever the machine has other work.
        "run.threads": 1,
        "vllm.kv_cache_gib": 0.25,
        # VAPO's lambda is 1 - 1 / (alpha length): for answers this short its own alpha leaves 0, and nothing but an untrained critic.
        "algo.advantage.alpha": 5.0,
    }
}
"""On top of a recipe, where the built-in model answers the built-in task."""


OFFLINE_RECIPES: dict[str, dict[str, object]] = {
    "none": {},
    "laptop": {
        "train.batch_size": 32,
        "train.max_tokens_per_gpu": 4096,
        "data.max_len": 512,
        "ds.param_dtype": "fp32",
    },
}
"""The same for programs that learn from labelled rows."""

OFFLINE_BUILT_IN: dict[str, dict[str, object]] = {
    "laptop": {
        "data.max_samples": 1280,
        "data.max_len": 64,
        # The small model's tokenizer knows no line break.
        "data.step_separator": " ",
        "train.max_epochs": 1,
        "model.adam.lr": 1e-3,
        "run.threads": 1,
        "eval.max_samples": 100,
        "eval.steps": 10,
    }
}

USING_RECIPES: dict[str, dict[str, object]] = {"none": {}, "laptop": {"model.param_dtype": "fp32"}}
"""The same for programs that use a model and train none."""

USING_BUILT_IN: dict[str, dict[str, object]] = {
    "laptop": {
        "rollout.max_new_tokens": 8,
        "data.max_len": 64,
        "data.max_samples": 100,
        "run.threads": 1,
        "vllm.kv_cache_gib": 0.25,
    }
}

LOOP_RECIPES: dict[str, dict[str, object]] = {
    "none": {},
    "laptop": {
        "rollout.batch_size": 64,
        "rollout.max_new_tokens": 64,
        "train.batch_size": 32,
        "train.iterations": 3,
        "train.max_tokens_per_gpu": 4096,
        "data.max_len": 512,
        "ds.param_dtype": "fp32",
    },
}
"""The same for the loops over generations."""

LOOP_BUILT_IN: dict[str, dict[str, object]] = {
    "laptop": {
        "rollout.batch_size": 128,
        "rollout.max_new_tokens": 8,
        "data.max_len": 64,
        "model.adam.lr": 3e-4,
        "run.threads": 1,
        "vllm.kv_cache_gib": 0.25,
    }
}

CONDITIONED: dict[str, dict[str, object]] = {
    "laptop": {
        # The small model's tokenizer knows digits, signs and the space.
        "condition.template": "{reward:.0f} {input}",
        # What a prefix means is new to it, and takes longer to learn than a choice between answers it has.
        "model.adam.lr": 1e-3,
        "train.max_epochs": 4,
    }
}
"""On top of that, where prompts tell rewards."""

Tables = tuple[dict[str, dict[str, object]], dict[str, dict[str, object]]]


def tables(known: Collection[str]) -> Tables:
    """The recipes of a command that has such settings, and what goes on top of each for the built-in model."""
    if "condition.template" in known:
        return LOOP_RECIPES, {name: own | CONDITIONED[name] for name, own in LOOP_BUILT_IN.items()}
    if "train.iterations" in known:
        return LOOP_RECIPES, LOOP_BUILT_IN
    if "model.param_dtype" in known:
        return USING_RECIPES, USING_BUILT_IN
    return (RECIPES, BUILT_IN) if "rollout.batch_size" in known else (OFFLINE_RECIPES, OFFLINE_BUILT_IN)


def choose(*, gpus: int, built_in: bool) -> tuple[str, str]:
    """The recipe nobody asked for, and why: the name and a reason to announce; without a reason there is nothing to say."""
    if not gpus:
        return "laptop", "no GPU is visible"
    if built_in:
        return "laptop", "the built-in model and task"
    return "none", ""


def values(recipe: str, *, known: Mapping[str, object], built_in: bool) -> dict[str, object]:
    """What a recipe sets, among the settings a verb has."""
    plain, own = tables(known)
    everything = plain[recipe] | (own.get(recipe, {}) if built_in else {})
    return {name: value for name, value in everything.items() if name in known}
