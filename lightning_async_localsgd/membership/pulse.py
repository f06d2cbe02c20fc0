"""The pulse of each process of a job: its signs of life, and its phase in the current stage."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from enum import Enum
from typing import NamedTuple

from lightning_async_localsgd.errors import AsyncLocalSGDError, PeerAbortedError, PeerLostError, error_by_name
from lightning_async_localsgd.membership.store import JobStore

__all__ = ["Phase", "Pulse", "Watch"]

_MOST_SECONDS = 2.0
_TOLD_SECONDS = 10.0  # the others notice a process that ends without a last heartbeat only by its silence
_REASON_LENGTH = 4000


class Phase(str, Enum):
    """The state of a process in its stage of the job (a fit, a validation)."""

    HERE = "here"
    """It takes part: it meets the others, trains, or takes over the final module."""
    LEFT = "left"
    """It has done its part and needs nothing more from the others."""
    FAILED = "failed"
    """It has stopped because of an error."""


class Heartbeat(NamedTuple):
    """The latest message of a process."""

    number: int
    host: str
    stage: int
    phase: Phase
    reason: tuple[str, str]
    """The class and the text of the error of a failed process."""


class Pulse:
    """Writes a sign of life of this process to the store every few seconds, on a thread of its own.

    The process owns one key in the store, ``pulse/<rank>``, which holds its latest :class:`Heartbeat`. A change is
    written at once. The thread ends with the process, or when the store does not answer; others then notice the
    silence.

    Args:
        store: the job's part of the store.
        rank: rank of this process.
    """

    def __init__(self, store: JobStore, rank: int) -> None:
        self._store = store.clone()
        self._key = f"pulse/{rank}"
        self._heartbeat = Heartbeat(0, socket.gethostname(), -1, Phase.HERE, ("", ""))
        self._changed = threading.Condition()
        self._published = 0
        self._ended = False
        threading.Thread(target=self._run, name="async-localsgd-pulse", daemon=True).start()

    @property
    def phase(self) -> Phase:
        """The phase of this process in its stage."""
        return self._heartbeat.phase

    def set_timeout(self, timeout: timedelta) -> None:
        """Set the maximum time that others wait for a sign of life from now on."""
        with self._changed:
            self._store.timeout = timeout
            self._changed.notify_all()

    def publish(self, stage: int, phase: Phase, error: BaseException | None = None) -> None:
        """Publish the phase of this process. Returns when the store has it, or does not answer.

        Args:
            stage: number of the stage.
            phase: the phase of this process in that stage.
            error: the error by which it has failed.
        """
        reason = (type(error).__name__, str(error)[:_REASON_LENGTH]) if error is not None else ("", "")
        with self._changed:
            self._heartbeat = Heartbeat(self._heartbeat.number + 1, self._heartbeat.host, stage, phase, reason)
            count = self._heartbeat.number
            self._changed.notify_all()
            timeout = min(_TOLD_SECONDS, self._store.timeout.total_seconds() / 4)
            self._changed.wait_for(lambda: self._published >= count or self._ended, timeout)

    @property
    def _seconds(self) -> float:
        return min(_MOST_SECONDS, self._store.timeout.total_seconds() / 4)

    def _run(self) -> None:
        with suppress(RuntimeError):  # the store is gone
            while True:
                heartbeat = self._heartbeat
                self._store.set(self._key, json.dumps(heartbeat))
                self._store.check([self._key])  # a write alone would not notice that the host is gone
                self._wait(heartbeat)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _wait(self, published: Heartbeat) -> None:
        """Wait until the next heartbeat is due."""
        with self._changed:
            self._published = published.number
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._heartbeat.number > published.number, self._seconds):
                self._heartbeat = self._heartbeat._replace(number=published.number + 1)


class Watch:
    """Checks, during a wait for other processes, that these may still come. Made when the wait begins.

    Args:
        store: the job's part of the store.
        stage: the stage of the wait.
        size: number of processes.
        worker_size: number of processes of a worker, for the names in messages.
        timeout: maximum time without a sign of life.
    """

    def __init__(self, store: JobStore, stage: int, size: int, worker_size: int, timeout: timedelta) -> None:
        self._store = store
        self._stage = stage
        self._size = size
        self._worker_size = worker_size
        self._timeout = timeout.total_seconds()
        self._began = time.monotonic()
        self._heard: dict[int, tuple[int, float]] = {}  # number and time of each one's latest heartbeat

    def check(self, missing: Sequence[int]) -> None:
        """Make sure that the missing processes may still come.

        Raises:
            PeerAbortedError: if one has failed by an error of its own.
            AsyncLocalSGDError: if one has failed because of a third process; of the same class as its error.
            PeerLostError: if one has left, or has shown no sign of life for the timeout.
        """
        heartbeats = {rank: heartbeat for rank in missing if (heartbeat := self._read(rank)) is not None}
        for rank, heartbeat in heartbeats.items():
            if heartbeat.stage == self._stage and heartbeat.phase is Phase.FAILED:
                raise self._failed(rank, heartbeat)
        for rank, heartbeat in heartbeats.items():
            if heartbeat.stage > self._stage or (heartbeat.stage == self._stage and heartbeat.phase is Phase.LEFT):
                raise PeerLostError(
                    f"{self._name(rank, heartbeat)} has left this part of the job, and others still wait for it: not "
                    "all workers go through the same calls. Look at its log.",
                    gone=rank // self._worker_size,
                )
        silent = [rank for rank in missing if self._silence(rank, heartbeats.get(rank)) > self._timeout]
        if silent:
            raise self._lost(silent, heartbeats)

    def find(self, rank: int) -> AsyncLocalSGDError | None:
        """The reason for which a process will not come; None while it may come."""
        try:
            self.check([rank])
        except AsyncLocalSGDError as error:
            return error
        return None

    def _read(self, rank: int) -> Heartbeat | None:
        key = f"pulse/{rank}"
        if not self._store.check([key]):
            return None
        count, host, stage, phase, reason = json.loads(self._store.get(key))
        return Heartbeat(count, host, stage, Phase(phase), tuple(reason))

    def _silence(self, rank: int, heartbeat: Heartbeat | None) -> float:
        """Seconds without a sign of life of a process, as far as this process can know."""
        now = time.monotonic()
        count, since = self._heard.get(rank, (-1, self._began))
        if heartbeat is not None and heartbeat.number != count:
            count, since = heartbeat.number, now
            self._heard[rank] = count, since
        return now - since

    def _name(self, rank: int, heartbeat: Heartbeat | None) -> str:
        worker = f"Worker {rank // self._worker_size}"
        process = f"rank {rank}, " if self._worker_size > 1 else ""
        return f"{worker} ({process}host {heartbeat.host})" if heartbeat is not None else worker

    def _failed(self, rank: int, heartbeat: Heartbeat) -> AsyncLocalSGDError:
        kind, text = heartbeat.reason
        # An error about a third process is passed on unchanged.
        return error_by_name(kind, text) or PeerAbortedError(
            f"{self._name(rank, heartbeat)} stopped: {': '.join(filter(None, heartbeat.reason))}"
        )

    def _lost(self, silent: Iterable[int], heartbeats: dict[int, Heartbeat]) -> PeerLostError:
        never = [rank for rank in silent if rank not in heartbeats]
        if never:
            workers = sorted({rank // self._worker_size for rank in never})
            return PeerLostError(
                f"Worker {', '.join(map(str, workers))} of {self._size // self._worker_size} did not come within "
                f"{self._timeout:g} s. It failed or was not started: look at its log, or raise `timeout`."
            )
        names = ", ".join(self._name(rank, heartbeats[rank]) for rank in silent)
        return PeerLostError(
            f"{names} has shown no sign of life for {self._timeout:g} s. It was killed or froze, or the network to it "
            "failed. Look for the cause in its own log, then start the job again."
        )
