"""Acting: engines, sampling, rewards and verified weight sync."""
