"""A worker of several devices: its first rank takes part in the exchange, the others repeat each step's changes.

Within a worker the ranks train as under DDP: gradients are averaged, so parameters are equal after every step. The
exchange changes the tensors of the first rank, which sends them to the others at the end of the same step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroup, Store
from torch.optim import Optimizer

from lightning_async_localsgd.errors import PeerAbortedError, PeerLostError, error_by_name
from lightning_async_localsgd.exchange import Adoption
from lightning_async_localsgd.membership.address import make_gloo_group
from lightning_async_localsgd.protocol.messages import Cut, Message, message_from_json
from lightning_async_localsgd.protocol.progress import OuterUpdate
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.worker.replica import Replica, forget_non_finite_state, unversioned
from lightning_async_localsgd.worker.saved_state import SavedState
from lightning_async_localsgd.worker.summary import RunSummary
from lightning_async_localsgd.worker.worker import Worker

__all__ = ["DeviceGroup", "FirstRank", "OtherRank"]

_A_DAY = timedelta(days=1)


class DeviceGroup:
    """The connections within a worker: the first rank sends commands and tensors to the others.

    Args:
        store: a part of the job's store, this worker's own.
        rank: rank of this process within the worker.
        size: processes of the worker.
        devices: the process group of the worker's devices, for tensors.
        address: the address at which this process is to listen for the others; None: gloo's choice.
    """

    def __init__(self, store: Store, rank: int, size: int, devices: ProcessGroup, address: str | None = None) -> None:
        self.rank = rank
        self.size = size
        # The others wait as long as the first rank waits for other workers, and these watch it. Its death is noticed.
        self._control: Any = make_gloo_group(PrefixStore("device_group", store), rank, size, _A_DAY, address)
        self._devices = devices

    def tell(self, word: Mapping[str, Any]) -> None:
        """Send a message to all other ranks; called on the first rank."""
        text = torch.frombuffer(bytearray(json.dumps(word).encode()), dtype=torch.uint8)
        self._broadcast_in(self._control, torch.tensor([len(text)]))
        self._broadcast_in(self._control, text)

    def hear(self) -> dict[str, Any]:
        """Receive the first rank's message; called on the other ranks.

        Raises:
            AsyncLocalSGDError: if the first rank is lost or has failed.
        """
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast_in(self._control, length)
        text = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast_in(self._control, text)
        word: dict[str, Any] = json.loads(bytes(text.numpy()))
        if "error" in word:
            kind, reason = word["error"]
            if (told := error_by_name(kind, reason)) is not None:
                raise told
            raise PeerAbortedError(f"The first rank of this worker stopped: {kind}: {reason}")
        return word

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Send the first rank's values to all."""
        for tensor in tensors:
            self._broadcast_in(self._devices, tensor.detach())

    def gather(self, own: bytes = b"") -> list[Tensor]:
        """Send the bytes of each other rank to the first rank; returns them by rank."""
        gathered = []
        for root in range(1, self.size):
            data = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own and root == self.rank else None
            length = torch.tensor([0 if data is None else data.numel()])
            self._broadcast_in(self._control, length, root)
            data = torch.empty(int(length), dtype=torch.uint8) if data is None else data
            self._broadcast_in(self._control, data, root)
            gathered.append(data)
        return gathered

    def _broadcast_in(self, group: Any, tensor: Tensor, root: int = 0) -> None:
        options = BroadcastOptions()
        options.rootRank = root
        wire = tensor.contiguous()
        try:
            group.broadcast([torch.view_as_real(wire) if wire.is_complex() else wire], options).wait()
        except RuntimeError as error:
            raise PeerLostError(
                "A process of this worker has died. Look for the cause in the logs of its ranks, then start the job "
                "again."
            ) from error
        if wire is not tensor:
            tensor.copy_(wire)

    def close(self) -> None:
        """Close the connections."""
        self._control = None


class FirstRank(Worker):
    """The first rank of a worker: a :class:`Worker` with other ranks that mirror it.

    Args:
        device_group: the device_group.
        *args: as for :class:`Worker`.
        **kwargs: as for :class:`Worker`.
    """

    def __init__(self, device_group: DeviceGroup, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._device_group = device_group
        self._restarted = False
        self._changed: set[int] = set()  # fragments
        self._updates: list[OuterUpdate] = []
        self._messages: list[tuple[int, Message]] = []
        self._untold: dict[str, list[Any]] = {"updates": [], "messages": []}  # not sent to the others yet

    def start(self, max_steps: int | None = None, open_end: bool = False) -> None:
        """See :meth:`Worker.start`."""
        with self._mirrored():
            super().start(max_steps, open_end)
            self._changed = self._all_fragments
        self._device_group.broadcast(list(self._replica.others.values()))

    def step(self, samples: int = 0) -> bool:
        """See :meth:`Worker.step`."""
        with self._mirrored() as word:
            word["running"] = running = super().step(samples)
        return running

    def finish(self, stop: bool = False) -> RunSummary:
        """See :meth:`Worker.finish`."""
        with self._mirrored() as word:
            summary = super().finish(stop)
            word["digest"] = summary.digest
            self._changed = self._all_fragments
        self._device_group.broadcast(list(self._replica.others.values()))
        return summary

    def abort(self, error: BaseException) -> None:
        """See :meth:`Worker.abort`."""
        super().abort(error)
        self._device_group.close()

    def swap_in_global(self, for_cut: bool = False) -> None:
        """See :meth:`Worker.swap_in_global`."""
        super().swap_in_global(for_cut)
        self._device_group.broadcast(unversioned(self._replica.in_module))

    @contextmanager
    def cut(self, what: Cut) -> Iterator[None]:
        """See :meth:`Worker.cut`; the other ranks call :meth:`OtherRank.cut`."""
        with ExitStack() as stack:
            with self._mirrored():
                stack.enter_context(super().cut(what))
            yield

    def gather_from_devices(self) -> list[Tensor]:
        """See :meth:`Worker.gather_from_devices`."""
        self._device_group.tell({"gather": True})
        return self._device_group.gather()

    def agree(self, decision: bool) -> bool:
        """See :meth:`Worker.agree`."""
        self._device_group.tell({"decision": decision})
        return decision

    def take_updates(self) -> list[OuterUpdate]:
        """See :meth:`Worker.take_updates`."""
        self._collect()
        updates, self._updates = self._updates, []
        return updates

    def take_messages(self) -> list[tuple[int, Message]]:
        """See :meth:`Worker.take_messages`."""
        self._collect()
        messages, self._messages = self._messages, []
        return messages

    def _collect(self) -> None:
        """Take new updates and messages, for this rank and for the others."""
        updates, messages = super().take_updates(), super().take_messages()
        self._updates += updates
        self._messages += messages
        self._untold["updates"] += updates
        self._untold["messages"] += [(sender, message.to_json()) for sender, message in messages]

    @property
    def _all_fragments(self) -> set[int]:
        return set(range(self.settings.fragments))

    def _adopted(self, adoption: Adoption) -> None:
        self._changed |= self._all_fragments if adoption.restart else {adoption.fragment}
        self._restarted |= adoption.restart

    @contextmanager
    def _mirrored(self) -> Iterator[dict[str, Any]]:
        """Send the outcome of the body, or its error, to the others. The body may add to the message."""
        word: dict[str, Any] = {}
        try:
            yield word
        except BaseException as error:
            with suppress(PeerLostError):
                self._device_group.tell({"error": [type(error).__name__, str(error)]})
            raise
        self._collect()
        self._device_group.tell(
            word
            | self._untold
            | {
                "changed": sorted(self._changed),
                "restarted": self._restarted,
                "weight_copies": sorted(self._replica.copies.names),
                "job_steps": self.job_steps,
                "local_steps": self.local_steps,
                "budget_spent": self.budget_spent,
                "stop_requested": self.stop_requested,
                "shard": self.shard,
                "pace_share": self.pace_share,
                "speeds": self.speeds,
                "summary": asdict(self.summary()),
            }
        )
        self._untold = {"updates": [], "messages": []}
        if self._changed:
            self._device_group.broadcast(self._replica.exchanged(self._changed))
        self._restarted = False
        self._changed = set()


class OtherRank:
    """Another rank of a worker: has the interface of a :class:`WorkerRank`, and repeats the first rank's changes.

    Args:
        device_group: the device_group.
        module: the module to train, on its device.
        optimizers: its inner optimizers.
        rank: rank of the worker.
        settings: settings of the run.
    """

    def __init__(
        self,
        device_group: DeviceGroup,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        rank: int,
        settings: Settings,
    ) -> None:
        self.rank = rank
        self.saved_state: SavedState | None = None  # the first rank has it
        self.alignment = self.exchanged_at = math.nan  # the first rank knows
        self.shard = rank
        self.pace_share = 1.0
        self.job_steps = 0
        self.local_steps = 0
        self.steps_made: tuple[int, ...] = ()
        self.budget_spent = False
        self.stop_requested = False
        self.speeds: tuple[float, ...] = ()
        self.on_gather: Callable[[], bytes] = bytes
        """Returns this process's own state for a checkpoint."""
        self._device_group = device_group
        self._replica = Replica(module, optimizers, settings.layout(module))
        self._optimizers = list(optimizers)
        self._summary: RunSummary | None = None
        self._updates: list[OuterUpdate] = []
        self._messages: list[tuple[int, Message]] = []

    def start(self, max_steps: int | None = None, open_end: bool = False) -> None:
        """See :meth:`Worker.start`."""
        self.mirror()
        self._device_group.broadcast(list(self._replica.others.values()))

    def step(self, samples: int = 0) -> bool:
        """See :meth:`Worker.step`."""
        running: bool = self.mirror()["running"]
        return running

    def finish(self, stop: bool = False) -> RunSummary:
        """See :meth:`Worker.finish`."""
        digest = self.mirror()["digest"]
        self._device_group.broadcast(list(self._replica.others.values()))
        return replace(self.summary(), digest=digest)

    def mirror(self) -> dict[str, Any]:
        """Repeat the changes of the first rank. Returns its message.

        Raises:
            AsyncLocalSGDError: if the first rank has failed.
        """
        word = self._device_group.hear()
        while "gather" in word:
            self._device_group.gather(self.on_gather())
            word = self._device_group.hear()
        for name in ("shard", "pace_share", "job_steps", "local_steps", "budget_spent", "stop_requested"):
            setattr(self, name, word[name])
        self.speeds = tuple(word["speeds"])
        summary: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in word["summary"].items()}
        self._summary = RunSummary(**summary)
        self._updates += [OuterUpdate(*update) for update in word["updates"]]
        self._messages += [(sender, message_from_json(message)) for sender, message in word["messages"]]
        if word["restarted"]:
            forget_non_finite_state(self._optimizers)
        if word["changed"]:
            self._replica.copies.names = set(word["weight_copies"])
            self._device_group.broadcast(self._replica.exchanged(word["changed"]))
        return word

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """See :meth:`Worker.watch`."""
        self._optimizers = list(optimizers)
        self._replica.watch(optimizers)

    def abort(self, error: BaseException) -> None:
        """Leave. The first rank notices."""
        self._device_group.close()

    def swap_in_global(self, for_cut: bool = False) -> None:
        """See :meth:`Worker.swap_in_global`."""
        self._replica.stash_local()
        self._device_group.broadcast(unversioned(self._replica.in_module))

    @contextmanager
    def cut(self, what: Cut) -> Iterator[None]:
        """The first rank has the exchange stand still, and tells what has become of it."""
        self.mirror()
        yield

    def global_tensors(self) -> dict[str, Tensor]:
        """The first rank has them."""
        return {}

    def gather_from_devices(self) -> list[Tensor]:
        """The first rank gathers; see ``on_gather``."""
        return []

    def swap_in_local(self) -> None:
        """See :meth:`Worker.swap_in_local`."""
        self._replica.swap_in_local()

    @property
    def global_swapped_in(self) -> bool:
        """See :meth:`Worker.global_swapped_in`."""
        return self._replica.global_swapped_in

    def summary(self) -> RunSummary:
        """See :meth:`Worker.summary`."""
        assert self._summary is not None
        return self._summary

    def take_updates(self) -> list[OuterUpdate]:
        """See :meth:`Worker.take_updates`."""
        updates, self._updates = self._updates, []
        return updates

    def take_messages(self) -> list[tuple[int, Message]]:
        """See :meth:`Worker.take_messages`."""
        messages, self._messages = self._messages, []
        return messages

    def agree(self, decision: bool) -> bool:
        """See :meth:`Worker.agree`."""
        agreed: bool = self._device_group.hear()["decision"]
        return agreed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The first rank's speed counts."""
        yield

    def pause(self) -> None:
        """The first rank's speed counts."""

    def resume(self) -> None:
        """The first rank's speed counts."""

    def send(self, message: Message) -> None:
        """Do nothing: the first rank sends the message."""

    def measure_updates(self) -> None:
        """Do nothing: the first rank requests the measurement."""
