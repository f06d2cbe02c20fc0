"""Checkpoints of a job: their content, their files, and the resuming of a ``fit``."""
