"""The built-in reward `builtin:code`: 1 where the program in the response passes every test of the label, else 0.

The label (an object, or JSON text of one) has {"inputs": [...], "outputs": [...]}: texts for standard input and expected
output, or, with "fn_name", lists of arguments and expected results. The program runs once for each test in a sandbox
(`sandbox`); what it printed or returned is compared out here, where it cannot reach: a program that exits early, prints
"passed" or redefines equality has to know the answer all the same.
"""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hone.rollout.errors import RewardError
from hone.rollout.rewards import sandbox

LIMITS = sandbox.Limits()
ALL_TESTS_S = 40.0
"""For all tests of a response [s], below the default --reward.timeout-s: a slow program fails, it does not end the run."""

_BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)

# Arguments come on standard input, the result leaves as the last line of standard output.
_CALL = """
import json, sys
sys.path.insert(0, "/box")
asked = json.load(sys.stdin)
import solution
found = getattr(solution, asked["name"], None) or getattr(solution.Solution(), asked["name"])
print("\\n" + json.dumps(found(*asked["arguments"])))
"""

# Refuse at the start, not at the first response, where there is no sandbox.
sandbox.available()


@dataclass(frozen=True, kw_only=True)
class Tests:
    """What a program is held to: `function` is None where it reads and prints."""

    function: str | None
    inputs: Sequence[Any]
    outputs: Sequence[Any]


def reward_func(queries: list[str], prompts: list[str], labels: list[object]) -> dict[str, object]:
    """OpenRLHF's form."""
    return grade(queries[0].removeprefix(prompts[0]), labels[0])


def grade(answer: str, label: object) -> dict[str, object]:
    """Reward and figures for the text of one response; RewardError where the label holds no tests."""
    tests = read_tests(label)
    program = last_program(answer)
    figures = {"answered": float(program is not None), "tests_passed": 0.0, "stopped": 0.0}
    if program is None:
        return {"rewards": 0.0, "extra_logs": figures}
    passed, end = 0, time.monotonic() + ALL_TESTS_S
    for given, expected in zip(tests.inputs, tests.outputs, strict=True):
        left_s = end - time.monotonic()
        if left_s <= 0:
            figures["stopped"] = 1.0
            break
        outcome = _run(program, tests.function, given, replace(LIMITS, wall_s=min(LIMITS.wall_s, left_s)))
        figures["stopped"] = float(bool(outcome.was_stopped))
        if outcome.exit != 0 or outcome.was_stopped or not _as_expected(outcome.stdout, expected, of_call=tests.function is not None):
            break  # all or nothing: what follows would cost time and change nothing
        passed += 1
    figures["tests_passed"] = passed / len(tests.inputs)
    return {"rewards": float(passed == len(tests.inputs)), "extra_logs": figures}


def last_program(text: str) -> str | None:
    """The last fenced block of a response; None if there is none."""
    found = _BLOCK.findall(text)
    return found[-1] if found else None


def read_tests(label: object) -> Tests:
    """The tests of a label; RewardError where there are none."""
    try:
        found = json.loads(label) if isinstance(label, str) else label
    except ValueError:
        found = None
    inputs, outputs = (found.get("inputs"), found.get("outputs")) if isinstance(found, Mapping) else (None, None)
    name = found.get("fn_name") if isinstance(found, Mapping) else None
    if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0:
        texts = name is None and all(isinstance(one, str) for one in [*inputs, *outputs])
        if texts or (isinstance(name, str) and all(isinstance(one, list) for one in inputs)):
            return Tests(function=name, inputs=inputs, outputs=outputs)
    raise RewardError(
        f"the label {str(label)[:200]!r} holds no tests for builtin:code; give {{'inputs': [text, ...], 'outputs': [text, ...]}}, or, "
        "with 'fn_name', a list of arguments for each input"
    )


def _run(program: str, function: str | None, given: Any, limits: sandbox.Limits) -> sandbox.Outcome:
    start = [sandbox.interpreter(), "-I"]
    if function is None:
        return sandbox.run([*start, "/box/solution.py"], files={"solution.py": program}, stdin=given.encode(), limits=limits)
    asked = json.dumps({"name": function, "arguments": given}).encode()
    files = {"solution.py": program, "call.py": _CALL}
    return sandbox.run([*start, "/box/call.py"], files=files, stdin=asked, limits=limits)


def _as_expected(stdout: bytes, expected: Any, *, of_call: bool) -> bool:
    text = stdout.decode("utf-8", "replace")
    if not of_call:
        return [line.rstrip() for line in text.rstrip().splitlines()] == [line.rstrip() for line in expected.rstrip().splitlines()]
    try:
        return equal(json.loads(text.rstrip().splitlines()[-1]), expected)
    except (ValueError, IndexError, RecursionError):
        return False


def equal(found: Any, expected: Any) -> bool:
    """Equality of JSON values: numbers by value (floats to 1e-9), and true is not 1."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, int | float) and isinstance(expected, int | float):
        if isinstance(found, int) and isinstance(expected, int):
            return found == expected
        return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(equal(one, other) for one, other in zip(found, expected, strict=True))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in found)
    return type(found) is type(expected) and found == expected
