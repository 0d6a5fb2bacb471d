"""Damaged and hostile files of every kind that a command reads; run by `python -m tests.fuzz N`."""
