"""The mailbox: the one place where the training thread and the exchange thread meet."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lightning_async_localsgd.exchange.failure import Failure
from lightning_async_localsgd.exchange.standing import Standing
from lightning_async_localsgd.outer import Unsendable
from lightning_async_localsgd.protocol.header import Flag, encode_message
from lightning_async_localsgd.protocol.messages import Abort, Cut, Message
from lightning_async_localsgd.protocol.progress import OuterUpdate, Progress
from lightning_async_localsgd.protocol.turn import PushedRound, may_push

__all__ = ["Adoption", "Live", "Mailbox", "Push"]

_REASON_LENGTH = 900  # characters; a header has room for that many of four bytes each
_UPDATES_KEPT = 4096  # outer updates that nobody has asked for yet; older ones are forgotten


@dataclass(frozen=True)
class Push:
    """A finished round. The training thread gives up both tensors (fp32, flat) until the :class:`Adoption` comes."""

    base: Tensor
    """What the worker held at the start of its progress, of the whole model: the global parameters, or what its dtype
    holds of them."""
    snapshot: Tensor
    """Local parameters of the pushed fragment, at the end of the round."""
    ready: Callable[[], object]
    """Waits until ``snapshot`` is filled (a copy from an accelerator may still run)."""
    round: PushedRound


@dataclass(frozen=True)
class Adoption:
    """New global parameters for the worker. It owns both tensors from now on."""

    fragment: int
    """The fragment that was pushed."""
    base: Tensor
    """Of the whole model; the part of the fragment holds the global parameters of now, all of it after a restart."""
    correction: Tensor
    """For the fragment: ``base`` minus the local parameters at the push, what to add to the local ones of now."""
    version: int
    """Version of the global parameters of now."""
    versions: tuple[int, ...]
    """That of each fragment."""
    unsendable: Unsendable
    """What of the push could not be sent."""

    @property
    def restart(self) -> bool:
        """Whether the delta was dropped: take ``base`` as it is and forget the local parameters."""
        return bool(self.unsendable.parameters)


class Live(NamedTuple):
    """How the worker stands now, as the next header will tell."""

    steps: int
    reserved: int
    speed: float
    flags: Flag
    message: Message | None


class Mailbox:
    """Everything that crosses between the two threads of a worker, guarded by one condition variable.

    Neither thread holds the condition while it computes or waits for the network, so neither keeps the other waiting.
    What the training thread does at every step takes no lock at all: it assigns or reads single references, which
    Python does atomically. The global state belongs to the exchange thread; :meth:`global_state` lends it.

    Args:
        progress: shared progress at the start.
        worker: rank of the worker.
    """

    def __init__(self, progress: Progress, worker: int = 0) -> None:
        self.published_at = time.monotonic()
        """When the latest progress came, in seconds of the monotonic clock."""
        self.alignment = math.nan
        """Cosine between worker 0's latest delta and the outer momentum, about; the exchange thread's to write."""
        self.measure_updates = False
        """Whether the training thread wants to know each update's norm and alignment, which takes time to compute."""
        self._condition = threading.Condition()
        self._state_lock = threading.Lock()
        self.standing = Standing()
        """What the training thread tells at every step."""
        self._flags = Flag.NONE
        self._outbox: deque[Message] = deque()
        self._inbox: deque[tuple[int, Message]] = deque()
        self._push: Push | None = None
        self._extending = False  # the training thread has taken its push back to add steps to it
        self._adoption: Adoption | None = None
        self._progress = progress
        self.worker = worker
        """Number of the worker in the run."""
        self._updates: deque[OuterUpdate] = deque(maxlen=_UPDATES_KEPT)
        self._news = False  # the training thread said something that the others should hear of now
        self._push_wanted = False  # the exchange thread holds a turn open
        self._waiting = False  # the training thread is blocked in here
        self._rung = -1  # the last turn that some worker opened
        self._cut: Cut | None = None
        self._failure = Failure(self._condition)

    @contextmanager
    def global_state(self) -> Iterator[None]:
        """Hold the global state still: the exchange thread while it changes it, others while they read it."""
        with self._state_lock:
            yield

    # ---- the training thread's side ---------------------------------------------------------------------------------

    @property
    def progress(self) -> Progress:
        """Shared progress after the latest turn."""
        return self._progress

    @property
    def failed(self) -> bool:
        """Whether the exchange has ended by an error."""
        return self._failure.is_known

    @property
    def push_wanted(self) -> bool:
        """Whether a turn is being held open for this worker's push."""
        return self._push_wanted

    def announce(self) -> None:
        """Have a turn opened now, so that the others hear what was reported and this worker hears of them."""
        with self._condition:
            self._news = True
            self._condition.notify_all()

    def flag(self, flags: Flag) -> None:
        """Raise ``flags``; they ride on the next header."""
        with self._condition:
            self._flags |= flags
            self._condition.notify_all()

    def abort(self, reason: str) -> None:
        """Have the next header say that this worker leaves, and nothing that was to be sent before."""
        with self._condition:
            self._flags |= Flag.ABORT
            self._outbox = deque([Abort(_printable(reason)[:_REASON_LENGTH])])
            self._cut = None
            self._news = True
            self._condition.notify_all()

    def send(self, message: Message, again: bool = False) -> None:
        """Send a message to all workers, this one included; it rides on the next header, one message on each.

        Sent ``again`` if its header has come to nothing, it goes before all others.

        Raises:
            ValueError: if it is too long.
        """
        encode_message(message)
        with self._condition:
            self._outbox.insert(0 if again else len(self._outbox), message)
        self.announce()

    @property
    def cut(self) -> Cut | None:
        """What all are to do at the end of the latest turn; no other begins before :meth:`release`."""
        return self._cut

    def release(self) -> None:
        """Let the exchange go on after a cut."""
        with self._condition:
            self._cut = None
            self._condition.notify_all()

    def untaken_push(self) -> Push | None:
        """The push that the exchange thread has not taken yet; during a cut it will not."""
        return self._push

    def take_messages(self) -> list[tuple[int, Message]]:
        """Messages that have come since the last call, with their senders, in the same order on every worker."""
        if not self._inbox:
            return []
        with self._condition:
            messages = list(self._inbox)
            self._inbox.clear()
            return messages

    def unflag(self, flags: Flag) -> None:
        """Lower ``flags``."""
        with self._condition:
            self._flags &= ~flags

    def push(self, push: Push, flags: Flag = Flag.NONE) -> None:
        """Hand over a finished round. Its adoption must have come before the next push."""
        with self._condition:
            assert self._push is None and self._adoption is None
            self._push = push
            self._extending = False
            self._flags |= flags
            self._condition.notify_all()

    def take_back(self, max_steps: int) -> Push | None:
        """Take back the push, if the exchange has not begun with it, to push it anew with further steps.

        Args:
            max_steps: only if the push has at most that many steps.
        """
        push = self._push  # the exchange thread may take it at any moment
        if push is None or push.round.steps > max_steps:
            return None
        with self._condition:
            push, self._push = self._push, None
            self._extending = push is not None
            return push

    def collect(self) -> Adoption | None:
        """The adoption, if it has come.

        Raises:
            BaseException: what the exchange thread died of.
        """
        if self._adoption is None and not self._failure.is_known:
            return None
        with self._condition:
            self._failure.raise_explained()
            adoption, self._adoption = self._adoption, None
            return adoption

    def wait_for_adoption(self) -> Adoption | None:
        """Block until the adoption of the last push comes; or a cut, then None."""
        self._wait(lambda: self._adoption is not None)
        return self.collect()

    def wait_for_progress(self, than: Progress) -> Progress:
        """Block until there is newer progress ``than`` this, or a cut."""
        self._wait(lambda: self._progress is not than)
        return self._progress

    def wait_for_cut(self) -> None:
        """Block until the exchange stands still for a cut."""
        self._wait(lambda: False)

    def take_updates(self) -> list[OuterUpdate]:
        """The outer updates since the last call, oldest first."""
        with self._condition:
            updates = list(self._updates)
            self._updates.clear()
            return updates

    def _wait(self, until: Callable[[], bool]) -> None:
        with self._condition:
            self._waiting = True
            self._condition.notify_all()  # the exchange thread now looks after the others' health
            try:
                self._condition.wait_for(lambda: until() or self._cut is not None or self._failure.is_known)
            finally:
                self._waiting = False
            if not until() and self._cut is None:
                self._failure.raise_explained()

    # ---- the exchange thread's side ---------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether the training thread is blocked in here."""
        return self._waiting

    def wait_for_release(self) -> None:
        """Stand still while the training thread saves its side of a cut."""
        with self._condition:
            self._condition.wait_for(lambda: self._cut is None or self._failure.is_known)
            self._failure.raise_if_known()

    def wait_for_turn(self, turn: int, heartbeat: float, open_from: float) -> bool:
        """Sleep until ``turn`` is due; returns whether this worker is the one to open it.

        Args:
            turn: number of the next turn.
            heartbeat: seconds after which to open one anyway, to see whether all are still there.
            open_from: time of the monotonic clock before which a push alone opens no turn, unless the training thread
                waits for it.
        """
        until = time.monotonic() + heartbeat
        with self._condition:
            while True:
                self._failure.raise_if_known()
                now = time.monotonic()
                if self._rung >= turn:
                    return False
                hurries = self._waiting or Flag.FINAL in self._flags
                if self._news or now >= until or (self._push is not None and (hurries or now >= open_from)):
                    return True
                self._condition.wait((until if self._push is None else min(until, open_from)) - now)

    def wait_for_push(self) -> None:
        """Hold the turn open for a push, as long as the training thread said it is worth."""
        with self._condition:
            self._push_wanted = True
            self._condition.wait_for(
                lambda: self._extending or not may_push(self._flags, self._push is not None) or self._failure.is_known,
                timeout=self.standing.hold_open_seconds,
            )
            self._push_wanted = False
            self._failure.raise_if_known()

    def take(self) -> tuple[Live, Push | None]:
        """What the next header is to say, and the round to push with it."""
        with self._condition:
            # A training thread that fails while it extends its push aborts, and does not push any more.
            self._condition.wait_for(lambda: not self._extending or Flag.ABORT in self._flags or self._failure.is_known)
            push, self._push = self._push, None
            return self._take_live(), push

    def take_live(self) -> Live:
        """What a header without a round is to say. A push that waits here is left for the next one."""
        with self._condition:
            return self._take_live()

    def _take_live(self) -> Live:
        message = self._outbox.popleft() if self._outbox else None
        self._news = bool(self._outbox)
        flags = self._flags & ~Flag.FINAL if self._outbox or self._push is not None else self._flags
        caps = self._progress.caps
        steps, reserved, speed = self.standing.take(None if caps is None else caps[self.worker])
        return Live(steps, reserved, speed, flags, message)

    def publish(
        self,
        progress: Progress,
        updates: list[OuterUpdate],
        messages: list[tuple[int, Message]],
        adoption: Adoption | None,
    ) -> None:
        """Give the training thread the outcome of a turn."""
        with self._condition:
            self._progress = progress
            self.standing.turn_is_over()
            self.published_at = time.monotonic()
            self._updates.extend(updates)
            self._inbox.extend((worker, message) for worker, message in messages if not isinstance(message, Cut))
            if Flag.ABORT not in self._flags:  # else the training thread has left
                self._cut = next((message for _, message in messages if isinstance(message, Cut)), None)
            if adoption is not None:
                self._adoption = adoption
            self._condition.notify_all()

    def wait_for_bell(self, turn: int, timeout: float) -> bool:
        """Wait until the listener, too, has heard ``turn``; returns whether it has within ``timeout`` seconds."""
        with self._condition:
            heard = self._condition.wait_for(lambda: self._rung >= turn or self._failure.is_known, timeout)
            self._failure.raise_if_known()
            return heard

    def hear(self, turn: int) -> None:
        """Called by the bell's listener: some worker opened ``turn``."""
        with self._condition:
            self._rung = max(self._rung, turn)
            self._condition.notify_all()

    def fail(self, error: BaseException) -> BaseException:
        """End the training thread's part at its next step; returns the first error that this was called with."""
        return self._failure.set(error)

    def explain(self, error: BaseException) -> None:
        """Have the training thread raise ``error``, which was the cause of the error that ended it."""
        self._failure.explain(error)


def _printable(text: str) -> str:
    """``text`` without what JSON writes in six bytes (escape sequences) or cannot be encoded (lone surrogates)."""
    return "".join(c if c.isprintable() else " " for c in text)
