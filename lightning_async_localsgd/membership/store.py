"""The job's store with bounded calls: each call returns or raises in time, even if the host is stopped or cut off."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.membership.sockets import recorded_sockets

__all__ = ["JobStore", "bounded", "connect", "connection_to", "store_address"]

T = TypeVar("T")
_RETRY = 0.5  # seconds
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.005, 0.25  # seconds
_Call = tuple[Callable[[Store], Any], "Future[Any]"]


class JobStore:
    """A part of the job's store; every call ends in time.

    A call of libtorch's TCP store blocks until the store's host answers, whatever its timeout. So calls are made one
    after the other on a thread of this object's own, and are abandoned when their time is up. (Libtorch releases the
    interpreter's lock in all of them.) The next call notices a connection that is cut;
    :class:`~lightning_async_localsgd.membership.pulse.Pulse` makes one every few seconds.

    The object serves one thread at a time. Another thread uses :meth:`clone`.

    All parts of a store that are made from each other share its connection, for no call here waits for another process.
    Whatever does (a group that forms, the bell) uses a connection of its own (:func:`connection_to`), and there are few
    of these: for each one that opens, libtorch's store looks up the name of the host that it comes from, and nobody is
    answered before it has. Where the network's name server does not know its own hosts, that takes seconds.

    Args:
        native: the store.
        timeout: maximum time for an answer of its host.
    """

    def __init__(self, native: Store, timeout: timedelta) -> None:
        self.native = native
        self.timeout = timeout
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._unanswered: Future[Any] | None = None
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._calls.put, None)

    def within(self, name: str) -> JobStore:
        """The part of this store with the prefix ``name`` for all keys."""
        return JobStore(PrefixStore(name, self.native), self.timeout)

    def clone(self) -> JobStore:
        """The same part of the store, for another thread."""
        return JobStore(self.native, self.timeout)

    def close(self) -> None:
        """End the thread. A later call would begin a new one."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread = None

    # ---- calls ------------------------------------------------------------------------------------------------------
    # Each call raises PeerLostError if the store is gone, or its host does not answer within the timeout.

    def set(self, key: str, value: str | bytes) -> None:
        """Write a key."""
        self._call(lambda store: store.set(key, value))  # type: ignore[arg-type]  # it takes bytes as well

    def get(self, key: str) -> str:
        """The value of a key that exists."""
        return self.get_bytes(key).decode()

    def get_bytes(self, key: str) -> bytes:
        """The value of a key that exists, undecoded."""
        return self._call(lambda store: store.get(key))

    def multi_get(self, keys: Sequence[str]) -> list[str]:
        """The values of keys that exist."""
        values: list[bytes] = self._call(lambda store: store.multi_get(list(keys)))
        return [value.decode() for value in values]

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of these keys exist."""
        return self._call(lambda store: store.check(list(keys)))

    def add(self, key: str, amount: int) -> int:
        """Add to a counter. Returns its new value."""
        return self._call(lambda store: store.add(key, amount))

    def compare_set(self, key: str, expected: str, value: str) -> str:
        """Write a key if its value is ``expected`` (``""``: if the key does not exist). Returns its value now."""
        return self._call(lambda store: store.compare_set(key, expected, value)).decode()

    def delete_key(self, key: str) -> bool:
        """Delete a key. Returns whether it existed."""
        return self._call(lambda store: store.delete_key(key))

    def wait(self, keys: Sequence[str], timeout: timedelta) -> bool:
        """Wait until all of these keys exist. Returns whether they came within ``timeout``."""
        # Polls at growing intervals: each wait of libtorch's own that times out writes warnings to the log.
        pause, end = _SHORTEST_PAUSE, time.monotonic() + timeout.total_seconds()
        while not self.check(keys):
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    def _call(self, operation: Callable[[Store], T]) -> T:
        """Make one call on this object's thread."""
        if self._unanswered is not None and not self._unanswered.done():
            raise self._lost()
        if self._thread is None:
            self._thread = _start("async-localsgd-store", _serve, self.native, self._calls)
        answer: Future[T] = Future()
        self._calls.put((operation, answer))
        try:
            return answer.result(self.timeout.total_seconds())
        except FutureTimeoutError:
            self._unanswered = answer
            raise self._lost() from None
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError | None = None) -> PeerLostError:
        seconds = self.timeout.total_seconds()
        what = "is gone" if error is not None else f"did not answer within {seconds:g} s"
        return PeerLostError(
            f"The job's store{store_address(self.native)} {what}. Its host, worker 0 or the launcher beside it, has "
            "died or is frozen, or the network to it failed. Look for the cause in its log, then start the job again."
        )


def bounded(call: Callable[[], T], timeout: timedelta) -> T:
    """The result of ``call``, which is abandoned if it takes longer.

    Raises:
        TimeoutError: if it takes longer than ``timeout``.
    """
    answer: Future[T] = Future()
    _start("async-localsgd-bounded", _answer, call, answer)
    try:
        return answer.result(timeout.total_seconds())
    except FutureTimeoutError:
        if answer.done():  # the call itself has raised it
            raise
        raise TimeoutError(f"no result within {timeout.total_seconds():g} s") from None


def connect(host: bool, timeout: timedelta) -> Store:
    """The store at ``MASTER_ADDR:MASTER_PORT``.

    Args:
        host: whether this process is to host it.
        timeout: maximum time to wait for its host, or for a port that a dead process has not released yet.

    Raises:
        PeerLostError: if there is no store within ``timeout``.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout.total_seconds()

    def try_once() -> Store:
        left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
        libuv = os.environ.get("USE_LIBUV", "1") == "1"
        with recorded_sockets():
            return TCPStore(address, port, None, host, left, wait_for_workers=False, multi_tenant=True, use_libuv=libuv)

    while True:
        try:
            return bounded(try_once, timeout)
        except (RuntimeError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise _not_met(address, port, host, timeout) from error
        time.sleep(_RETRY)


def _not_met(address: str, port: int, host: bool, timeout: timedelta) -> PeerLostError:
    if host:
        return PeerLostError(
            f"Worker 0 cannot host the job's store: port {port} of {address} is in use. Another job may run on this "
            "host, or be about to end. Set `MASTER_PORT` to a port that is free."
        )
    return PeerLostError(
        f"The job's store at {address}:{port} could not be reached within {timeout.total_seconds():g} s. Its host, "
        "worker 0 or the launcher beside it, failed or was not started, or a firewall is in between: look at its log; "
        "or raise `timeout`."
    )


def connection_to(store: Store) -> Store:
    """The same store over a connection of its own, for whoever waits in it for other processes."""
    with recorded_sockets():
        return store.clone()  # type: ignore[attr-defined, no-any-return]  # missing in torch's stubs


def store_address(store: Store) -> str:
    """The location of a TCP store as part of a sentence; empty for another kind of store."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    return f" (at {host}:{port})" if host else ""


def _start(name: str, function: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=args, name=name, daemon=True)
    thread.start()
    return thread


def _serve(native: Store, calls: SimpleQueue[_Call | None]) -> None:
    """Make calls until None comes. Holds no reference to the :class:`JobStore`."""
    while (call := calls.get()) is not None:
        operation, answer = call
        try:
            answer.set_result(operation(native))
        except BaseException as error:
            answer.set_exception(error)
        del call, operation, answer


def _answer(call: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(call())
    except BaseException as error:
        answer.set_exception(error)
