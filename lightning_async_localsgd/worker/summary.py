"""A run in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import Self

from lightning_async_localsgd.protocol.progress import Progress

__all__ = ["RunSummary"]


@dataclass(frozen=True)
class RunSummary:
    """A run in numbers. All but ``bytes_*`` and ``blocked_seconds`` are alike on every worker after ``fit``.

    Those two are of this process; what was counted before a checkpoint that the run was resumed from is in all others.
    """

    version: int
    """Outer updates applied."""
    total_local_steps: int
    """Local steps of all workers together."""
    local_steps: tuple[int, ...]
    """Local steps of each worker."""
    mean_staleness: float
    """Mean over all deltas of the versions that passed between the start of a round and its application."""
    max_staleness: int
    round_length: int
    """H, local steps per round of the fastest worker: as given or, with ``"auto"``, what it has come to."""
    dropped: tuple[int, ...]
    """Non-finite deltas of each worker, which were not applied."""
    bytes_sent: int
    """Bytes this worker has sent to its peers, headers included."""
    bytes_received: int
    blocked_seconds: float
    """Time this worker's training thread has spent on the exchange instead of training: copies and waits, up to its
    last local step (not the wait for the others after it)."""
    digest: str
    """Hash (hex) of the final global parameters and outer state; empty while the run goes on."""

    @classmethod
    def of(cls, progress: Progress, blocked_seconds: float, digest: str) -> Self:
        """The summary of a run whose shared progress is this."""
        return cls(
            version=progress.version,
            total_local_steps=sum(progress.steps),
            local_steps=progress.steps,
            mean_staleness=progress.total_staleness / max(1, progress.updates),
            max_staleness=progress.max_staleness,
            round_length=progress.local_steps,
            dropped=progress.dropped,
            bytes_sent=progress.bytes_sent,
            bytes_received=progress.bytes_received,
            blocked_seconds=blocked_seconds,
            digest=digest,
        )
