"""Ray schedules, vLLM samples, DeepSpeed learns: the training programs and the command `launch`."""
