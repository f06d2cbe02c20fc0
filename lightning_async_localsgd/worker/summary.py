"""The summary of a run."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import Self

from lightning_async_localsgd.protocol.progress import Progress

__all__ = ["RunSummary"]


@dataclass(frozen=True)
class RunSummary:
    """The summary of a run. All except ``bytes_*`` and ``blocked_seconds`` are equal on all workers after ``fit``.

    These are of this process alone, since its start. All others include the run before a resumed checkpoint.
    """

    version: int
    """Number of outer updates applied."""
    total_local_steps: int
    """Local steps of all workers together."""
    local_steps: tuple[int, ...]
    """Local steps of each worker."""
    mean_staleness: float
    """Mean over all deltas of the versions that passed between the start of a round and its application."""
    max_staleness: int
    round_length: int
    """H, local steps per round of the fastest worker: as given or, with ``"auto"``, its latest value."""
    codec: str
    """The codec of the next exchange: as given or, with ``"auto"``, as chosen."""
    dropped: tuple[int, ...]
    """Number of non-finite deltas of each worker; these were not applied."""
    bytes_sent: int
    """Bytes sent by this worker to its peers, including headers."""
    bytes_received: int
    blocked_seconds: float
    """Time of this worker's training thread spent on the exchange instead of training, in seconds: copies and waits, up
    to its last local step (not the final wait for the others)."""
    digest: str
    """Hash (hex) of the final global parameters and outer state; empty while the run goes on."""

    @classmethod
    def of(cls, progress: Progress, blocked_seconds: float, digest: str) -> Self:
        """The summary of a run whose shared progress is this."""
        return cls(
            version=progress.version,
            total_local_steps=progress.total_steps,
            local_steps=progress.steps,
            mean_staleness=progress.total_staleness / max(1, progress.updates),
            max_staleness=progress.max_staleness,
            round_length=progress.local_steps,
            codec=progress.codec,
            dropped=progress.dropped,
            bytes_sent=progress.bytes_sent,
            bytes_received=progress.bytes_received,
            blocked_seconds=blocked_seconds,
            digest=digest,
        )
