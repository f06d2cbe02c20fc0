"""Signals whose handlers may save a checkpoint wait for the end of the batch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["HeldSignals", "saving_signals"]

_Handler = Callable[[int, FrameType | None], Any]


def saving_signals(environment: object) -> set[int]:
    """Signals whose handlers may save a checkpoint: those without a meaning of their own, and that of a SLURM requeue.

    Args:
        environment: the cluster environment.
    """
    numbers = (getattr(signal, "SIGUSR1", None), getattr(signal, "SIGUSR2", None))
    return {int(n) for n in (*numbers, getattr(environment, "requeue_signal", None)) if n is not None}


class HeldSignals:
    """Holds back signal handlers while a worker counts a step, pushes or adopts.

    Python runs a signal handler between any two instructions of the main thread. Lightning's handler for a SLURM
    requeue saves a checkpoint, and so may a handler of the user: in the middle of an adoption, the checkpoint would be
    of no one moment. A handler that is held back runs at the end of the :meth:`held` body.

    Args:
        numbers: the signals. A signal without a Python handler is left alone.
    """

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._handlers: dict[int, _Handler] = {}
        self._holding = False
        self._pending: list[tuple[int, FrameType | None]] = []
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._pending.append((number, frame))
        if not self._holding:
            self._run_handlers()

    def _run_handlers(self) -> None:
        """Run what is pending. A signal that comes meanwhile waits: a save is not to be interrupted by another one."""
        while self._pending:
            number, frame = self._pending.pop(0)
            with self._hold():
                self._handlers[number](number, frame)

    @contextmanager
    def _hold(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the handlers back in the body, unless it raises."""
        with self._hold():
            yield
        self._run_handlers()

    def release(self) -> None:
        """Give the signals back to their handlers, if these have not been replaced meanwhile."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)
        self._handlers = {}
