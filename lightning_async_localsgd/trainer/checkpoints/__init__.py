"""Checkpoints of a job: what they hold, how they are written, and how a ``fit`` goes on from one."""
