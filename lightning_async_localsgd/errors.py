"""The errors of the exchange; each names the worker it is about."""

from __future__ import annotations

__all__ = [
    "AsyncLocalSGDError",
    "NotFiniteError",
    "PeerAbortedError",
    "PeerLostError",
    "ReplicaDivergedError",
    "WorkerMismatchError",
    "error_by_name",
]


class AsyncLocalSGDError(RuntimeError):
    """Base of every error that the exchange raises on the training thread."""


class PeerLostError(AsyncLocalSGDError):
    """A worker died, froze, or sent something that is not a header.

    Args:
        message: which worker, and what to do.
        silent: its rank, if it did not answer in time; it may itself be waiting for another worker.
        gone: its rank, if its connection was closed; it may itself have waited in vain for another worker.
    """

    def __init__(self, message: str, silent: int | None = None, gone: int | None = None) -> None:
        super().__init__(message)
        self.silent = silent
        self.gone = gone

    @property
    def suspect(self) -> int | None:
        """Rank of the silent or gone worker, if known: it is lost, or itself waits for the lost one."""
        return self.gone if self.silent is None else self.silent


class PeerAbortedError(AsyncLocalSGDError):
    """A worker stopped because of an error of its own, and reported it before it left."""


class WorkerMismatchError(AsyncLocalSGDError):
    """The workers were started with different models, settings or library versions."""


class ReplicaDivergedError(AsyncLocalSGDError):
    """Two workers hold different global parameters at the same version."""


class NotFiniteError(AsyncLocalSGDError):
    """A worker's parameters were not finite at the end of several rounds in a row, and none of them was applied."""


_TOLD = (NotFiniteError, PeerAbortedError, PeerLostError, ReplicaDivergedError, WorkerMismatchError)
_BY_NAME: dict[str, type[AsyncLocalSGDError]] = {kind.__name__: kind for kind in _TOLD}


def error_by_name(kind: str, text: str) -> AsyncLocalSGDError | None:
    """The error that another process reports; None if ``kind`` is no reported class, or ``text`` no string."""
    return _BY_NAME[kind](text) if kind in _BY_NAME and isinstance(text, str) else None
