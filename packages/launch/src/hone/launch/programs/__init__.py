"""The programs behind the verbs: what a command does from its settled configuration to its exit code."""
