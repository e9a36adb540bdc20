"""Tasks that come with the project: prompts, labels and the reward function that judges them."""
