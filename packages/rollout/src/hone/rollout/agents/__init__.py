"""Environments by the protocols that users have: agent files of OpenRLHF, Gymnasium environments, and our own `Env`."""
