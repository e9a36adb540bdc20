"""Chat servers in front of the engines: agents speak OpenAI's or Anthropic's protocol, what is trained on are the ids that were sampled."""
