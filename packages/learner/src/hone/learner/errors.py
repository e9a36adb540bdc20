"""What the learner can fail with; each str() is the whole message: what, where, how to mend it."""


class ModelError(Exception):
    """A model that cannot be used: not found, in a format that is not safe to read, or of an unsupported architecture."""


class NumericsError(Exception):
    """A loss or a gradient norm that is not finite; the parameters are as they were before the step."""

    def __init__(self, *, role: str, step: int, what: str, skipped: int = 1) -> None:
        self.role, self.step, self.what, self.skipped = role, step, what, skipped
        group = ROLE_FLAGS.get(role, role)
        again = f", {skipped} times in a row" if skipped > 1 else ""
        super().__init__(
            f"{role}: {what} at optimiser step {step}{again}; the parameters were left as they were before it. "
            f"Lower --{group}.adam.lr or --{group}.max-norm, and look at the rewards and the log-probability gap of the steps before; "
            f"--{group}.max-skipped-steps is how many such steps in a row are left out before the run ends"
        )


ROLE_FLAGS = {"policy": "actor"}
"""Flag group of a role, where it is not the role's own name."""


class CheckpointError(Exception):
    """A checkpoint that cannot be loaded, or one that could not be written."""
