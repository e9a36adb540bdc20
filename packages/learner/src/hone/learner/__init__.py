"""Learning: engines, packing, log-probabilities, heads; see `learner.py`."""
