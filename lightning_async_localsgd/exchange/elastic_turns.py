"""Turns among workers that come and go: how those of a new view bring each other to the same state.

All that the exchange knows is a replicated log: whoever has closed the same turns holds the same. So the members of a
view compare how far each is, and the one that is furthest tells the others what they lack. A delta that a lost turn had
under way is sent again, unless it is part of that state.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_async_localsgd.codecs import ErrorFeedback
from lightning_async_localsgd.errors import PeerLostError, ReplicaDivergedError, WorkerMismatchError
from lightning_async_localsgd.exchange.mailbox import Mailbox
from lightning_async_localsgd.exchange.trade import Gather, Reduce, Trade
from lightning_async_localsgd.exchange.transport import Channel, Transport, Wait
from lightning_async_localsgd.exchange.turns import Generation, RingsAll, Turns
from lightning_async_localsgd.membership import Roster, as_json, from_json
from lightning_async_localsgd.outer import GlobalModel
from lightning_async_localsgd.protocol.accounts import Accounts
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.members import NO_STATE, View
from lightning_async_localsgd.protocol.messages import Message, message_from_json
from lightning_async_localsgd.protocol.progress import Progress, ReferenceTurn
from lightning_async_localsgd.settings import Settings

__all__ = ["ElasticTurns"]

_CHUNK = 1 << 20  # bytes
_UNDER_WAY = 8  # chunks
_MOST_TOLD = 1 << 26  # bytes of JSON


@dataclass(frozen=True)
class _Greeting:
    """What each member of a view tells the others."""

    fingerprint: str
    position: tuple[int, int]
    checksum: int


class ElasticTurns(Turns):
    """See :class:`Turns`. Between two views, :meth:`meet` makes the members of the new one equal.

    Args:
        mailbox: where to meet the training thread.
        state: the global state.
        feedbacks: errors of the codec, of each fragment.
        settings: settings of the run.
        budget: how many local steps the run has, but for the number of workers that it is planned for.
        workers: number of workers that the run is planned for; None: those that it begins with.
        fingerprint: values that must be equal on all workers: name to JSON value.
        own: this worker's tensors that are not exchanged, by name.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        state: GlobalModel,
        feedbacks: Sequence[ErrorFeedback],
        settings: Settings,
        budget: Budget,
        workers: int | None,
        fingerprint: Mapping[str, Any],
        own: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self.books = Accounts()
        super().__init__(mailbox, state, settings, budget, self.books)
        self._feedbacks = feedbacks
        for feedback in feedbacks:
            feedback.can_undo = True
        self._given = self._planned = workers
        self._fingerprint = json.dumps(dict(fingerprint), sort_keys=True)
        self._own = own
        self.has_state = self.has_run = False
        self._missed: list[tuple[int, Message]] = []  # messages of a turn that others have closed

    @property
    def position(self) -> tuple[int, int]:
        """How far this worker's copy of the run is: the number of its next turn, and its version.

        The turn comes first: whoever was left behind in the middle of a turn may have applied more of it than those who
        have gone on.
        """
        return (self._turn, self._state.version) if self.has_state else NO_STATE

    @property
    def number(self) -> int:
        """The number of this worker in the run."""
        return self._roster.number

    @property
    def planned_workers(self) -> int:
        """Number of workers that the run is planned for."""
        assert self._planned is not None
        return self._planned

    # ---- a new view -------------------------------------------------------------------------------------------------

    def meet(self, view: View, rank: int, roster: Roster, transport: Transport, bell: RingsAll) -> None:
        """Bring the members of a view to the same state, and go on with them.

        Args:
            view: its members.
            rank: this worker among them.
            roster: the same members.
            transport: connects them.
            bell: wakes them.

        Raises:
            PeerLostError: if one is lost meanwhile.
            WorkerMismatchError: if this worker was started with another model, other settings or another version.
        """
        greetings = self._greet(transport)
        newest = _newest(greetings)
        self._check(greetings[rank], greetings[newest], roster, newest)
        if greetings[newest].position == NO_STATE:
            self._begin(view)
        behind = [
            r
            for r, greeting in enumerate(greetings)
            if (greeting.position[1], greeting.checksum) != (greetings[newest].position[1], greetings[newest].checksum)
            or greeting.position == NO_STATE
        ]
        version = self._state.version
        if greetings[rank].position == greetings[newest].position and rank in behind and self.has_state:
            warnings.warn(
                f"This worker held other global parameters than {roster.name(newest)}, and took over theirs. That is "
                "faulty memory, an outer optimizer that is not deterministic, or a bug.",
                stacklevel=2,
            )
        self._tell_state(transport, rank, newest, [r for r in behind if r != newest])
        moved = not self.has_state or self._state.version != version
        self.has_state = True
        progress = self._ledger.meet(view.members)
        self._turn += 1  # who knows these members is further than who does not
        before = self._mailbox.worker if self.has_run else None
        roster.numbers = [self.books.number_of(member) for member in view.members]
        if before is not None and before != roster.number:
            raise ReplicaDivergedError(
                "This worker had begun a run of its own, and found another run of the same job: the Lighthouse did not "
                "know of both. Start this worker again."
            )
        self.has_run = True
        with self._mailbox.global_state():
            self._state.set_workers(len(view.members))
        self.enter(Generation(roster, transport, self._make_trades(transport, rank, len(view.members)), bell))
        self._publish(progress, moved)

    def take(self) -> bool:
        """See :meth:`Turns.take`."""
        over = super().take()
        for feedback in self._feedbacks:  # the turn is closed, and its errors are what they are
            feedback.begin_turn()
        return over

    def begin_at_once(self) -> None:
        """Have the next turn take place without a bell: all members of a new view do."""
        self._mailbox.hear(self._turn)

    def _greet(self, transport: Transport) -> list[_Greeting]:
        digest = hashlib.blake2b(self._fingerprint.encode(), digest_size=16).hexdigest()
        own = _Greeting(digest, self.position, self._state.checksum() if self.has_state else 0)
        text = json.dumps(asdict(own)).encode()
        sizes = [int.from_bytes(data, "little") for data in transport.gather(len(text).to_bytes(4, "little"))]
        if max(sizes) > _MOST_TOLD:
            raise PeerLostError("A worker sent a greeting that is too long.")
        greetings = []
        for data in transport.gather_some(text, sizes):
            try:
                told = json.loads(data)
                turn, version = map(int, told["position"])
                greetings.append(_Greeting(str(told["fingerprint"]), (turn, version), int(told["checksum"])))
            except (ValueError, KeyError, TypeError) as error:
                raise PeerLostError(f"A worker sent something that is not a greeting: {error}.") from error
        return greetings

    def _check(self, own: _Greeting, newest: _Greeting, roster: Roster, leader: int) -> None:
        if own.fingerprint != newest.fingerprint:
            raise WorkerMismatchError(
                f"This worker was started differently than {roster.name(leader)}. Start all workers with the same "
                "code, model and settings."
            )

    def _begin(self, view: View) -> None:
        """The beginning of a run, alike on all its first members."""
        self._planned = self._given or len(view.members)
        self.books.load_state_dict(Accounts().state_dict())  # an attempt to begin may have failed
        self.books.meet(view.members)
        budget = self._budget()
        length = self._settings.round_length(budget.max_steps)
        start = Progress.at_start(len(view.members), length.first())
        start = replace(start, shard_samples=(0,) * self._planned)
        caps = budget.caps(start.steps, start.round_steps)
        self._ledger.go_on_from(replace(start, caps=caps, codec=self._ledger.codec), budget)

    def _budget(self) -> Budget:
        return replace(self._ledger.budget, workers=self.planned_workers)

    def _make_trades(self, transport: Transport, rank: int, size: int) -> list[Trade]:
        parts = [(part.pseudo_gradient, part.layout.parameter_numel) for part in self._state.fragments]
        both = zip(parts, self._feedbacks, strict=True)
        if not self._state.sums:
            return [Gather(transport, rank, *part, feedback) for part, feedback in both]
        return [Reduce(transport, rank, *part, feedback, [1 / size] * size) for part, feedback in both]

    def _publish(self, progress: Progress, moved: bool) -> None:
        """Tell the training thread how things stand, and adopt what it had pushed if that has been applied."""
        adoption = None
        if self._pending is not None:
            settled = self.books.workers[self.number].settled_rounds
            if settled > self._pending.round.round or self._unsendable.parameters:
                adoption = self._settle(self._pending, self._unsendable)
        for feedback in self._feedbacks:
            if self._pending is not None or not moved:  # what was under way when the view before ended is void
                feedback.undo_turn()
            else:
                feedback.begin_turn()
        if self._told is not None:
            self._mailbox.send(self._told, again=True)
            self._told = None
        self._mailbox.worker = self.number
        self._mailbox.publish(progress, [], self._missed, adoption)
        self._mailbox.standing.forget_turns()
        self._missed = []

    # ---- the state --------------------------------------------------------------------------------------------------

    def _tell_state(self, transport: Transport, rank: int, newest: int, behind: list[int]) -> None:
        """Have all know the books of the member that is furthest, and those that are behind its tensors."""
        tensors: list[Tensor] = []
        if rank == newest:
            progress = self._ledger.progress
            told: dict[str, Any] = {
                "turn": self._turn,
                "closed": self._closed,
                "version": self._state.version,
                "messages": [[worker, message.to_json()] for worker, message in self._messages],
                "planned": self.planned_workers,
                "workers": self._state.fragments[0].workers,
                "books": self.books.state_dict(),
                "progress": asdict(progress) | {"reference_turn": tuple(progress.reference_turn)},
            }
            if behind:
                whole = {"state": self._state.state_dict(), "own": dict(self._own())}
                told["state"] = _strip(whole, tensors)
            told["tensors"] = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in tensors]
            text = json.dumps(as_json(told)).encode()
        else:
            text = b""
        text = self._spread(transport, rank, newest, text)
        if rank == newest:
            _send(transport, tensors, behind)
            return
        try:
            told = from_json(json.loads(text))
            loaded = None
            if rank in behind:
                tensors = [torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in told["tensors"]]
                _receive(transport, tensors, newest)
                loaded = _restore(told["state"], tensors)
            self._take_over(told, loaded)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise PeerLostError(f"A worker told something else than the state of the run: {error!r}.") from error

    def _spread(self, transport: Transport, rank: int, root: int, text: bytes) -> bytes:
        sizes = [int.from_bytes(data, "little") for data in transport.gather(len(text).to_bytes(8, "little"))]
        if sizes[root] > _MOST_TOLD:
            raise PeerLostError("A worker sent books that are too long.")
        return transport.gather_some(text, sizes)[root]

    def _take_over(self, told: Mapping[str, Any], loaded: Mapping[str, Any] | None) -> None:
        """Go on from what another worker has told."""
        if self.has_state and self._state.version > told["version"]:
            raise ReplicaDivergedError(
                "The others have lost sight of this worker in the middle of a turn, and have gone on without updates "
                "that it has applied. Start it again: it takes over what they hold."
            )
        if loaded is not None:
            with self._mailbox.global_state():
                self._state.set_workers(told["workers"])
                self._state.load_state_dict(loaded["state"])
            own = self._own()
            for name, tensor in loaded["own"].items():
                if not self.has_state and name in own and own[name].shape == tensor.shape:
                    own[name].copy_(tensor)
        if told["closed"] == self._closed + 1:  # the turn that this worker has missed
            self._missed = [(worker, message_from_json(message)) for worker, message in told["messages"]]
            self._told = None
        self._turn, self._closed = told["turn"], told["closed"]
        self._planned = told["planned"]
        self.books.load_state_dict(told["books"])
        reference = ReferenceTurn(*told["progress"]["reference_turn"])
        self._ledger.go_on_from(Progress(**told["progress"] | {"reference_turn": reference}), self._budget())


def _newest(greetings: Sequence[_Greeting]) -> int:
    """The rank of the member that is furthest: of several, of those that hold the same as most others the first."""
    furthest = max(greeting.position for greeting in greetings)
    ranks = [rank for rank, greeting in enumerate(greetings) if greeting.position == furthest]
    alike = Counter(greetings[rank].checksum for rank in ranks)
    return max(ranks, key=lambda rank: (alike[greetings[rank].checksum], -rank))


def _strip(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` with a place holder for each tensor, which is added to ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return {"$tensor": len(tensors) - 1}
    if isinstance(value, dict):
        return {key: _strip(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_strip(item, tensors) for item in value)
    return value


def _restore(value: Any, tensors: Sequence[Tensor]) -> Any:
    """The value that :func:`_strip` has taken apart."""
    if isinstance(value, dict):
        if value.keys() == {"$tensor"}:
            return tensors[value["$tensor"]]
        return {key: _restore(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_restore(item, tensors) for item in value)
    return value


def _chunks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from tensor.view(-1).view(torch.uint8).split(_CHUNK) if tensor.numel() else ()


def _send(transport: Transport, tensors: Sequence[Tensor], peers: Sequence[int]) -> None:
    _run(transport.send(chunk, peer, Channel.BROADCAST) for chunk in _chunks(tensors) for peer in peers)


def _receive(transport: Transport, tensors: Sequence[Tensor], peer: int) -> None:
    _run(transport.receive(chunk, peer, Channel.BROADCAST) for chunk in _chunks(tensors))


def _run(transfers: Iterator[Wait]) -> None:
    """Wait for transfers, several of which are under way."""
    under_way: deque[Wait] = deque()
    for wait in transfers:
        under_way.append(wait)
        if len(under_way) == _UNDER_WAY:
            under_way.popleft()()
    while under_way:
        under_way.popleft()()
