"""Attention over packed rows, one implementation per file."""
