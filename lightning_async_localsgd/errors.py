"""Every error of the exchange, each naming the worker it is about."""

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
        silent: its rank, if it did not answer in time: it may itself be waiting for another.
        gone: its rank, if its connection was closed: it may itself have waited in vain for another.
    """

    def __init__(self, message: str, silent: int | None = None, gone: int | None = None) -> None:
        super().__init__(message)
        self.silent = silent
        self.gone = gone

    @property
    def suspect(self) -> int | None:
        """The worker that this one had to do with, if it is known: lost, or itself in wait for the lost one."""
        return self.gone if self.silent is None else self.silent


class PeerAbortedError(AsyncLocalSGDError):
    """A worker stopped because of an error of its own, and said so before it left."""


class WorkerMismatchError(AsyncLocalSGDError):
    """The workers were started with different models, settings or library versions."""


class ReplicaDivergedError(AsyncLocalSGDError):
    """Two workers hold different global parameters at the same version."""


class NotFiniteError(AsyncLocalSGDError):
    """A worker's parameters were not finite at the end of several rounds in a row, so that it learned nothing."""


_TOLD = (NotFiniteError, PeerAbortedError, PeerLostError, ReplicaDivergedError, WorkerMismatchError)
_BY_NAME: dict[str, type[AsyncLocalSGDError]] = {kind.__name__: kind for kind in _TOLD}


def error_by_name(kind: str, text: str) -> AsyncLocalSGDError | None:
    """The error that another process tells of; None if it is of no class that is told of, or not told in words."""
    return _BY_NAME[kind](text) if kind in _BY_NAME and isinstance(text, str) else None
