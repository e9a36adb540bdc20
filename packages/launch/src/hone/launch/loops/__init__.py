"""What the loops over generations are made of: the stages of an iteration, what is chosen to learn from, and what is finished."""
