"""Files and hub datasets in, validated records and token ids out.

Flow: source (a dataset of any kind, or a built-in task) -> PromptSet (validated rows) -> Prompts (token ids) -> PromptStream (draws).
Nothing is imported here, so that a reward worker can load a task, or the command line a setting, in milliseconds.
"""
