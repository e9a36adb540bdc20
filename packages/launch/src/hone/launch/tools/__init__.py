"""Commands that train nothing; each has `run(words)`, which returns the exit code."""
