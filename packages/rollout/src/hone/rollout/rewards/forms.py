"""The three signatures a reward function may have, told apart by its parameters, and how each is called for one response.

OpenRLHF's `reward_func(queries, prompts, labels)` returns {"rewards", "scores", "extra_logs"}; TRL's
`f(prompts, completions, **columns)` a list; verl's `compute_score(data_source, solution_str, ground_truth, extra_info)` a
number or {"score": number, ...}. Each becomes a call with one RewardItem that returns OpenRLHF's dict, not yet checked.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hone.rollout.errors import RewardError
from hone.rollout.rewards.result import NOT_APPLICABLE, Array, RewardItem, refused

Form = Literal["openrlhf", "trl", "verl"]

PARAMETERS = ("queries", "prompts", "labels")
VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
EXPECTED = "def reward_func(queries, prompts, labels)"
ACCEPTED = f"{EXPECTED} (OpenRLHF), def f(prompts, completions, **columns) (TRL) or def compute_score({', '.join(VERL)}) (verl)"

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Parameters that only one form has; "prompts", "labels" and "ground_truth" may be columns of TRL's form.
_MARKS: Mapping[Form, frozenset[str]] = {
    "openrlhf": frozenset({"queries"}),
    "trl": frozenset({"completions", "completion_ids"}),
    "verl": frozenset({"solution_str", "data_source"}),
}


@dataclass(frozen=True, kw_only=True)
class CallingForm:
    """How a function is called: OpenRLHF's by three positions or by name, TRL's with `columns` (None: any), verl's by name."""

    form: Form
    by_name: bool = False
    columns: frozenset[str] | None = None
    required: frozenset[str] = frozenset()


def recognised(signature: inspect.Signature, *, name: str, where: str) -> CallingForm:
    """The form of a function called `name` at `where`; RewardError if none fits, or more than one."""
    parameters = signature.parameters
    marked = [form for form, marks in _MARKS.items() if marks & set(parameters)]
    shown = f"reward function {where} is {name}{signature}"
    if len(marked) > 1:
        both = " and ".join(sorted(set(parameters) & frozenset().union(*_MARKS.values())))
        raise RewardError(f"{shown}, which mixes several forms ({both}); keep the parameters of one: {ACCEPTED}")
    if marked == ["trl"]:
        return _trl(signature, shown)
    if marked == ["verl"]:
        if _binds(signature, **dict.fromkeys(VERL)):
            return CallingForm(form="verl", by_name=True)
        raise RewardError(
            f"{shown}, which cannot be called with verl's {', '.join(VERL)} by name; write def compute_score({', '.join(VERL)})"
        )
    if not marked:
        open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        if open_ended and len(parameters) == 1 + sum(one in PARAMETERS for one in parameters) and not _binds(signature, *PARAMETERS):
            # Nothing but **columns beside names that two forms share: queries or completions, it would take either.
            raise RewardError(f"{shown}, which fits more than one form; name the parameters it reads: {ACCEPTED}")
    return CallingForm(form="openrlhf", by_name=_openrlhf_by_name(signature, shown))


def _trl(signature: inspect.Signature, shown: str) -> CallingForm:
    parameters = signature.parameters.values()
    if nameless := [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_ONLY]:
        raise RewardError(f"{shown}; TRL's form is called by name, and {', '.join(nameless)} cannot be: drop the / from its signature")
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    named = [one for one in parameters if one.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)]
    return CallingForm(
        form="trl",
        by_name=True,
        columns=None if takes_all else frozenset(one.name for one in named),
        required=frozenset(one.name for one in named if one.default is inspect.Parameter.empty),
    )


def _openrlhf_by_name(signature: inspect.Signature, shown: str) -> bool:
    """False: call with three positions, as OpenRLHF does; True: by name only; RewardError if neither fits."""
    positional = [one.name for one in signature.parameters.values() if one.kind in _POSITIONAL][: len(PARAMETERS)]
    swapped = any(name in PARAMETERS and name != PARAMETERS[index] for index, name in enumerate(positional))
    for by_name in (False, True):
        fits = _binds(signature, **dict.fromkeys(PARAMETERS)) if by_name else _binds(signature, *PARAMETERS)
        if fits and not swapped:
            return by_name
    raise RewardError(f"{shown}, which cannot be called as expected; write {ACCEPTED}")


def _binds(signature: inspect.Signature, *positions: object, **names: object) -> bool:
    try:
        signature.bind(*positions, **names)
    except TypeError:
        return False
    return True


def called(call: Callable[..., object], form: CallingForm, item: RewardItem, *, where: str) -> object:
    """What `call` returns (or its coroutine) for one response, handed over as its form wants it."""
    if form.form == "openrlhf":
        lists = ([item.query], [item.prompt], [item.label])
        return call(**dict(zip(PARAMETERS, lists, strict=True))) if form.by_name else call(*lists)
    if form.form == "verl":
        label = item.label
        # verl's own rows keep the answer as reward_model["ground_truth"]; there that column is the label.
        truth = label["ground_truth"] if isinstance(label, Mapping) and "ground_truth" in label else label
        source = item.columns.get("data_source", "")
        extra = item.columns.get("extra_info", dict(item.columns))
        return call(data_source=source, solution_str=item.answer, ground_truth=truth, extra_info=extra)
    given: dict[str, object] = {name: [value] for name, value in item.columns.items()}
    given = {"label": [item.label], "labels": [item.label], **given, "prompts": [item.prompt], "completions": [item.answer]}
    if missing := sorted(form.required - given.keys()):
        raise RewardError(
            f"reward function {where} asks for {', '.join(missing)}, which the rows do not have (they have {', '.join(sorted(given))}); "
            "name the column with --data.label-key, or rename the parameter"
        )
    return call(**(given if form.columns is None else {name: value for name, value in given.items() if name in form.columns}))


def as_result(returned: object, form: CallingForm, *, where: str, prompt_id: str) -> object:
    """What a function of this form returned, as OpenRLHF's dict; `result.checked` judges its numbers."""
    if form.form == "openrlhf":
        return returned
    if form.form == "verl":
        if not isinstance(returned, Mapping):
            return {"rewards": returned}
        if "score" not in returned:
            what = f"a dict with {', '.join(map(repr, returned)) or 'nothing'} and without 'score'"
            raise refused(where, what, prompt_id=prompt_id, expected="a number or a dict with 'score'")
        # verl's functions return words beside the figures (the extracted answer); only figures can be logged.
        figures = {name: value for name, value in returned.items() if name != "score" and isinstance(value, int | float)}
        return {"rewards": returned["score"], "extra_logs": figures}
    values = returned.tolist() if isinstance(returned, Array) else returned
    if not isinstance(values, list | tuple):
        what = f"{repr(values)[:200]} ({type(returned).__name__})"
        raise refused(where, what, prompt_id=prompt_id, expected="a list with one number for each completion")
    if len(values) == 1 and values[0] is None:
        return NOT_APPLICABLE
    return {"rewards": list(values)}
