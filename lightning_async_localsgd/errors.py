"""Every error of the exchange, each naming the worker it is about."""

__all__ = ["AsyncLocalSGDError", "PeerAbortedError", "PeerLostError", "ReplicaDivergedError", "WorkerMismatchError"]


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


class PeerAbortedError(AsyncLocalSGDError):
    """A worker stopped because of an error of its own, and said so before it left."""


class WorkerMismatchError(AsyncLocalSGDError):
    """The workers were started with different models, settings or library versions."""


class ReplicaDivergedError(AsyncLocalSGDError):
    """Two workers hold different global parameters at the same version."""
