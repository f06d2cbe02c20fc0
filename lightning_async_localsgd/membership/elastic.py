"""Elastic membership: workers that come and go, as torchft's Lighthouse sees them.

Every worker asks the Lighthouse for a quorum, again and again, and every answer goes to all who asked. What each tells
with its question decides who takes part (:func:`~lightning_async_localsgd.protocol.members.choose_view`). The exchange
has nothing to do with it between two changes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from lightning_async_localsgd.membership.store import bounded
from lightning_async_localsgd.protocol.members import NO_STATE, Candidate, Member, View, choose_view

__all__ = ["NAME_VARIABLE", "ElasticMembership", "Lighthouse", "new_incarnation", "worker_name"]

NAME_VARIABLE = "ASYNC_LOCALSGD_WORKER"
"""The environment variable that names a worker."""

_INTERVAL = 0.25  # seconds between two questions, and between two heartbeats
_SETTLE = 3.0  # seconds for which nobody has come, before a run begins
_RETURN = 5.0  # seconds for all to find a Lighthouse that was started anew
_PATIENCE = timedelta(seconds=20)  # for an answer to a question: until enough have asked
_CONNECT = timedelta(seconds=5)
_RETRY = 5.0  # seconds after which one that could not be reached is tried again, at first
_LONGEST_RETRY = 80.0


def worker_name() -> str:
    """The name of this worker: that of the environment, or its host and process."""
    return os.environ.get(NAME_VARIABLE) or f"{socket.gethostname()}-{os.getpid()}"


def new_incarnation() -> str:
    """A name for this process that no other has, and that sorts after those of before."""
    return f"{time.time_ns():016x}-{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class Lighthouse:
    """Where a job's workers find each other.

    Args:
        address: ``host:port`` of the Lighthouse.
        job: name of the job: workers of others are ignored.
        token: a secret that the workers of the job share; without the same one a process is ignored.
        min_workers: fewer do not train.
        max_workers: more do not take part; None: no limit.
    """

    address: str
    job: str = "job"
    token: str = ""
    min_workers: int = 1
    max_workers: int | None = None

    @property
    def url(self) -> str:
        """The address as torchft takes it."""
        return self.address if "://" in self.address else f"http://{self.address}"

    def own_address(self) -> str:
        """This host's address on the route to the Lighthouse, where the others can reach it, too."""
        host, _, port = self.address.rpartition("://")[2].rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
            family, kind, protocol, _, target = found[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # of a datagram: this chooses the route and sends nothing
                return str(probe.getsockname()[0])
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`lighthouse` must be the HOST:PORT of a Lighthouse that this host can reach, got {self.address!r} "
                f"({error})."
            ) from error

    def proof(self, *parts: object) -> str:
        """What only a worker of the job that knows the token can tell of these values."""
        text = json.dumps([self.job, self.min_workers, self.max_workers, *map(str, parts)])
        return hmac.new(self.token.encode(), text.encode(), hashlib.sha256).hexdigest()


class ElasticMembership:
    """Asks for quorums on a thread of its own, and tells the latest view.

    Args:
        lighthouse: where to ask.
        member: this process.
        position: returns how far this worker's copy of the run is; see :class:`Candidate`.
        on_change: called on the membership's thread after each change of the view.
    """

    def __init__(
        self,
        lighthouse: Lighthouse,
        member: Member,
        position: Callable[[], tuple[int, int]],
        on_change: Callable[[], None],
    ) -> None:
        self.member = member
        self._lighthouse = lighthouse
        self._position = position
        self._on_change = on_change
        self._changed = threading.Condition()
        self._view: View | None = None
        self._attempt = self._asked = self._count = 0
        self._unreachable: dict[str, float] = {}  # until when
        self._retries: dict[str, float] = {}
        self._gathering: str | None = None  # the view of those who want to begin a run
        self._gathering_since = 0.0
        self._restarted_since: float | None = None  # the Lighthouse
        self._left = self._warned = False
        self._trouble: str | None = "it has not answered yet"
        self._error: BaseException | None = None

    @property
    def view(self) -> View | None:
        """The latest view with this worker among its members; None: there is none now."""
        return self._view

    @property
    def trouble(self) -> str | None:
        """Why the Lighthouse gives no view; None: it does, or waits for others."""
        return self._trouble

    def start(self) -> None:
        """Begin to ask."""
        for target in (self._ask, self._beat):
            threading.Thread(target=target, name="async-localsgd-membership", daemon=True).start()

    def wait(self, than: View | None, timeout: float) -> View | None:
        """Wait until there is a view other ``than`` this; returns it, or None after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_other(than) or self._error is not None, timeout)
            if self._error is not None:
                raise self._error
            return self._view if self._is_other(than) else None

    def _is_other(self, than: View | None) -> bool:
        return self._view is not None and (than is None or self._view.key != than.key)

    def reject(self, view: View, unreachable: tuple[Member, ...] = ()) -> None:
        """Ask for another view than this one, which has failed.

        Args:
            view: the view.
            unreachable: its members that could not be connected to.
        """
        with self._changed:
            self._attempt = max(self._attempt, view.attempt + 1)
            for member in unreachable:
                retry = self._retries.get(member.incarnation, _RETRY)
                self._retries[member.incarnation] = min(2 * retry, _LONGEST_RETRY)
                self._unreachable[member.incarnation] = time.monotonic() + retry
            self._changed.notify_all()

    def leave(self) -> None:
        """Ask no more: the others go on without this worker."""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    # ---- the threads ------------------------------------------------------------------------------------------------

    def _client(self) -> Any:
        os.environ.setdefault("RUST_LOG", "error")  # else every question is logged
        from torchft.coordination import LighthouseClient

        return LighthouseClient(self._lighthouse.url, _CONNECT)

    def _beat(self) -> None:
        client: Any = None
        while not self._left:
            try:
                client = client or self._client()
                bounded(partial(client.heartbeat, self._id, _CONNECT), 2 * _CONNECT)
            except ImportError:
                return  # the other thread tells
            except BaseException:  # torchft raises errors of many kinds
                client = None
            time.sleep(_INTERVAL)

    def _ask(self) -> None:
        client: Any = None
        while not self._left:
            try:
                client = client or self._client()
                self._asked = self._attempt
                ask = partial(client.quorum, self._id, _PATIENCE, data=self._tell())
                quorum = bounded(ask, 2 * _PATIENCE)  # a Lighthouse that is frozen answers nothing
                self._trouble = None
                self._take(int(quorum.quorum_id), quorum.participants)
            except ImportError as error:
                with self._changed:
                    self._error = ImportError(
                        f"Workers that come and go need torchft: `pip install torchft` ({error})."
                    )
                    self._changed.notify_all()
                return
            except BaseException as error:  # torchft raises errors of many kinds
                self._trouble = str(error)
                client = None
            with self._changed:
                self._changed.wait_for(lambda: self._left or self._attempt > self._asked, _INTERVAL)

    @property
    def _id(self) -> str:
        return f"{self.member.name}:{self.member.incarnation}"

    def _tell(self) -> dict[str, Any]:
        now = time.monotonic()
        with self._changed:
            self._unreachable = {name: until for name, until in self._unreachable.items() if until > now}
            self._count += 1
            told = {
                "member": list(self.member),
                "count": self._count,
                "attempt": self._attempt,
                "unreachable": sorted(self._unreachable),
                "position": list(self._position()),
            }
            return told | {"proof": self._lighthouse.proof(json.dumps(told, sort_keys=True))}

    def _take(self, quorum: int, participants: Any) -> None:
        found = [candidate for participant in participants if (candidate := self._read(participant)) is not None]
        if len(found) < len(participants) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(participants) - len(found)} other processes ask the same Lighthouse with another job name or "
                "token: they are ignored. One Lighthouse serves one job.",
                stacklevel=2,
            )
        view = choose_view(found, self._lighthouse.min_workers, self._lighthouse.max_workers, quorum)
        if view is not None and view.rank_of(self.member.incarnation) is None:
            view = None
        if all(candidate.position == NO_STATE for candidate in found) and not self._is_complete(view):
            view = None
        if not self._is_trusted(view):
            return
        with self._changed:
            if view is not None:
                self._attempt = max(self._attempt, view.attempt)
            if (view and view.key) == (self._view and self._view.key):
                return
            self._view = view
            self._changed.notify_all()
        self._on_change()

    def _is_trusted(self, view: View | None) -> bool:
        """Whether to go by what a Lighthouse says: one that was started anew does not know at once who is there."""
        now = self._view
        if view is None or now is None or view.quorum >= now.quorum:
            self._restarted_since = None
            return True
        if self._restarted_since is None:
            self._restarted_since = time.monotonic()
        if (view.members, view.attempt) == (now.members, now.attempt):
            return False  # nothing has changed
        return set(view.members) >= set(now.members) or time.monotonic() - self._restarted_since > _RETURN

    def _is_complete(self, view: View | None) -> bool:
        """Whether a run may begin with this view: as many are there as may be, or nobody has come for a while."""
        key = view and view.key
        if key != self._gathering:
            self._gathering, self._gathering_since = key, time.monotonic()
        full = view is not None and len(view.members) == self._lighthouse.max_workers
        return full or time.monotonic() - self._gathering_since >= _SETTLE

    def _read(self, participant: Any) -> Candidate | None:
        """What another process has told; None if it is of another job, or does not know the token."""
        with suppress(Exception):  # whatever a stranger may have told
            told = dict(participant.data)
            proof = str(told.pop("proof"))
            if hmac.compare_digest(self._lighthouse.proof(json.dumps(told, sort_keys=True)), proof):
                name, incarnation, host, port = told["member"]
                turn, version = map(int, told["position"])
                return Candidate(
                    Member(str(name), str(incarnation), str(host), int(port)),
                    int(told["attempt"]),
                    frozenset(map(str, told["unreachable"])),
                    (turn, version),
                    int(told["count"]),
                )
        return None
