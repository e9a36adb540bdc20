"""Checkpoints: every rank writes its own share of every role, and one directory appears whole or not at all.

Flow of a save: engine --pieces--> snapshot (one memory copy) --writer thread--> step_N.partial/*.safetensors --manifest,
rename--> step_N. Flow of a load: step_N --verify--> files --(any range of any tensor)--> engine, whatever its ranks and stage.
"""
