"""Whether a run has learnt anything: one whose every step was left out has not, however smoothly it came to its end."""

from collections.abc import Mapping, Sequence

from hone.launch.observe.run_directory import RunDirectory, read_metrics
from hone.learner.errors import NumericsError


def check_learnt(directory: RunDirectory, skipped: Mapping[str, str]) -> None:
    """Raises NumericsError where all of a run's steps were left out, those before it was resumed, too.

    `skipped` has the metric of each role that learns: the share of a step's optimiser steps that were left out [1]. The first role that
    took any step decides: where it learnt nothing, the run did not do what it was for.
    """
    steps = read_metrics(directory.path)[0]
    for role, name in skipped.items():
        tried: Sequence[float] = [step[name] for step in steps if name in step]
        if tried and min(tried) == 1:
            what = "nothing was learnt, for in every step the loss or the gradient norm was not finite: the last"
            raise NumericsError(role=role, step=len(tried), what=what, skipped=len(tried))
        if tried:
            return
