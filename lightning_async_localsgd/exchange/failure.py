"""The failure of an exchange: known to the training thread at once, and its first cause a little later."""

from __future__ import annotations

import threading

from lightning_async_localsgd.errors import AsyncLocalSGDError
from lightning_async_localsgd.exchange.causes import LOOK_UP

__all__ = ["Failure"]


class Failure:
    """The error that has ended an exchange, if there is one.

    Args:
        condition: guards it. Callers of :meth:`raise_if_known` and :meth:`raise_explained` hold it.
    """

    def __init__(self, condition: threading.Condition) -> None:
        self._condition = condition
        self._error: BaseException | None = None
        self._explained = False  # the error is the first that any worker met, as far as that can be known

    @property
    def is_known(self) -> bool:
        """Whether the exchange has ended by an error."""
        return self._error is not None

    def set(self, error: BaseException) -> BaseException:
        """Note an error; returns the first that was noted."""
        with self._condition:
            if self._error is None:
                self._error = error
            self._condition.notify_all()
            return self._error

    def explain(self, error: BaseException) -> None:
        """Note the first cause in the place of the error."""
        with self._condition:
            self._error = error
            self._explained = True
            self._condition.notify_all()

    def raise_explained(self) -> None:
        """Raise the error, if there is one: its first cause, if that is found in time."""
        if self.is_known:
            self._condition.wait_for(lambda: self._explained, timeout=LOOK_UP)
        self.raise_if_known()

    def raise_if_known(self) -> None:
        """Raise the error, if there is one."""
        if isinstance(self._error, AsyncLocalSGDError):  # says by itself what to do; where it arose is of no use
            raise self._error.with_traceback(None) from None
        if self._error is not None:
            raise self._error
