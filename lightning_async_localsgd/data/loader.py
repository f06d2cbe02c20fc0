"""The training loaders of one worker: the user's own, over the worker's part of each pass."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Sampler

from lightning_async_localsgd.data.division import Division, Pass
from lightning_async_localsgd.internals import DatasetSamplerWrapper, extract_batch_sizes

__all__ = [
    "Orders",
    "UnderWay",
    "WorkerLoader",
    "count_samples",
    "generators_of",
]


class _Drawn(NamedTuple):
    """A batch between the sampler and the training step."""

    name: Pass
    unit: int
    samples: int | None


class WorkerLoader:
    """A map-style loader over this worker's part of each pass, with a position.

    Everything else of the loader (collation, its own processes, its attributes) is unchanged.

    Args:
        loader: the loader. Its batch sampler is replaced: the loader must not be used otherwise.
        division: divides the batches among the workers.
        seed: seed of the order of the samples, for samplers that draw it from global generators.
        fetches: returns the number of batches fetched in this epoch (with several loaders, from all together), and the
            number of these not trained yet.
        device: rank of this process within its worker.
        devices: number of processes of the worker; each gets one batch of a unit.
        orders: orders that have already been drawn, shared by several workers of one process.
        for_training: returns whether the training loop iterates. Any other iteration is over this process's part of the
            data, as under DDP, and draws nothing from the training.
        place: rank of this process and the number of processes, for that part.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        division: Division,
        seed: int,
        fetches: Callable[[], tuple[int, int]],
        device: int = 0,
        devices: int = 1,
        orders: Orders | None = None,
        for_training: Callable[[], bool] = lambda: True,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        self.division = division
        self._for_training = for_training
        self._place = place
        self._loader = loader
        self._fetches = fetches
        self._ended_after = 0  # number of fetches
        self._fetched: deque[_Drawn] = deque()
        source = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        self.sampler = _WorkerBatches(source, division, seed, device, devices, orders)
        # DataLoader forbids a new sampler because an iterator may exist: here there is none yet.
        vars(loader)["batch_sampler" if loader.batch_sampler is not None else "sampler"] = self.sampler

    def __getattr__(self, name: str) -> Any:
        # The position is in the job's part of a checkpoint. Lightning's part must remain readable to other strategies.
        if name in ("state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    @property
    def original(self) -> DataLoader[Any]:
        """The user's loader."""
        return self._loader

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        if not self._for_training():
            return iter(self._looked_at())
        self._settle()
        # Making an iterator draws a random number, which must not count to the first fetch.
        return UnderWay(self._batches(iter(self._loader) if self._loader.num_workers == 0 else self._loader))

    def __reduce__(self) -> Any:
        """Copy as the user's loader, over all of the data: a copy takes no part in the division."""
        users = copy(self._loader)
        name = "batch_sampler" if users.batch_sampler is not None else "sampler"
        vars(users).update({name: self.sampler.source, "_iterator": None})
        return _itself, (users,)

    def _looked_at(self) -> DataLoader[Any]:
        """The same loader, with processes of its own if it has any, over this process's part of the data."""
        loader = copy(self._loader)
        name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        vars(loader).update({name: _Part(self.sampler.first_order, *self._place), "_iterator": None})
        return loader

    def _batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; nothing is drawn before the first is requested, because Lightning makes iterators in vain."""
        self._fetched.clear()
        for batch in batches:
            self._fetched.append(self.sampler.drawn.popleft())
            yield batch
            self._note_trained(but=2)  # the batch that is about to be trained, and at most one fetched ahead
        self._ended_after, _ = self._fetches()
        self.sampler.end_pass()

    def _settle(self) -> None:
        """Record the trained batches. A batch is trained when its step has ended without an error."""
        fetched, untrained = self._fetches()
        if self.sampler.at_the_end:  # later fetches came from other loaders
            untrained -= max(0, fetched - self._ended_after)
        self._note_trained(but=max(0, untrained))

    def _note_trained(self, but: int) -> None:
        """Record that all fetched batches except the last ``but`` have been trained."""
        while len(self._fetched) > but:
            drawn = self._fetched.popleft()
            self.division.trained(drawn.name, drawn.unit)

    @property
    def samples(self) -> int | None:
        """Number of samples of the batch trained last; None if the loader does not make batches."""
        _, untrained = self._fetches()
        place = len(self._fetched) - 1 - untrained
        return self._fetched[place].samples if place >= 0 else None

    def division_state(self) -> dict[str, Any]:
        """The ``state_dict`` of the division, with all trained batches recorded."""
        self._settle()
        return self.division.state_dict()


class _Part(Sampler[Any]):
    """Every k-th batch of a pass; all k processes get the same number, as under DDP."""

    def __init__(self, order: Callable[[], list[Any]], rank: int, size: int) -> None:
        self._order = order
        self._rank = rank
        self._size = size

    def __iter__(self) -> Iterator[Any]:
        batches = self._order()
        for first in range(0, len(batches), self._size):
            yield batches[(first + self._rank) % len(batches)]


class UnderWay:
    """An iterator over batches. A copy is empty: the batches are this process's own."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def __reduce__(self) -> Any:
        return iter, ((),)


def _itself(value: Any) -> Any:
    return value


class Orders:
    """The batches of the latest passes, in the common order of all workers.

    Args:
        kept: number of passes to remember.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._orders: dict[Pass, list[Any]] = {}

    def get(self, name: Pass, draw: Callable[[], list[Any]]) -> list[Any]:
        """The batches of a pass; from ``draw`` if they are not remembered."""
        order = self._orders.pop(name, None)
        if order is None:
            order = draw()
        self._orders[name] = order  # last in the order of deletion
        while len(self._orders) > self._kept:
            del self._orders[next(iter(self._orders))]
        return order


class _WorkerBatches(Sampler[Any]):
    """This worker's batches of ``source``.

    A new iteration within an epoch continues the pass; after the end of a pass it begins the next pass of the epoch.
    """

    def __init__(
        self, source: Any, division: Division, seed: int, device: int, devices: int, orders: Orders | None
    ) -> None:
        self.source = source
        self.drawn: deque[_Drawn] = deque()
        """Batches that were drawn and have not been fetched yet."""
        self._division = division
        self._seed = seed
        self._device = device
        self._devices = devices
        self._orders = orders
        self._pass: Pass = (-1, 0)
        self.at_the_end = False
        """Whether the last batch of the pass has been fetched."""

    @property
    def batch_size(self) -> int | None:
        """The ``batch_size`` of the user's batch sampler; Lightning and other libraries read it."""
        return getattr(self.source, "batch_size", None)

    @property
    def drop_last(self) -> bool:
        """The ``drop_last`` of the user's batch sampler."""
        return getattr(self.source, "drop_last", False)

    def set_epoch(self, epoch: int) -> None:
        """Begin or continue an epoch, and pass its number to samplers that shuffle by it."""
        if epoch != self._pass[0]:
            self._pass = epoch, 0
        self.at_the_end = False
        self._tell_samplers(epoch)

    def _tell_samplers(self, epoch: int) -> None:
        for source in (self.source, getattr(self.source, "sampler", None)):
            set_epoch = getattr(source, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)

    def end_pass(self) -> None:
        """Mark the pass as ended, after its last batch was fetched: the next iteration is another pass."""
        self.at_the_end = True

    def __len__(self) -> int:
        return self._division.length(self._units(len(self.source)))

    def _units(self, batches: int) -> int:
        return -(-batches // self._devices)

    def __iter__(self) -> Iterator[Any]:
        self.drawn.clear()
        if self.at_the_end:
            self._pass, self.at_the_end = (self._pass[0], self._pass[1] + 1), False
        name = self._pass
        draw = partial(self._draw_order, name)
        batches = draw() if self._orders is None else self._orders.get(name, draw)
        for unit in self._division.units(name, self._units(len(batches))):
            # If the last unit has too few batches, the first batches fill it: each device needs one.
            batch = batches[(unit * self._devices + self._device) % len(batches)]
            self.drawn.append(_Drawn(name, unit, len(batch) if isinstance(batch, (list, tuple)) else None))
            yield batch

    def _draw_order(self, name: Pass) -> list[Any]:
        """All batches of a pass, in an order that has been checked to be the same on all workers."""
        batches = self._order(name[0])
        self._division.check_order(name, batches)
        return batches

    def first_order(self) -> list[Any]:
        """All batches of the first epoch: workers may be in different epochs, and their parts must be disjoint."""
        self._tell_samplers(0)
        try:
            return self._order(0)
        finally:
            self._tell_samplers(max(0, self._pass[0]))

    def _order(self, epoch: int) -> list[Any]:
        """All batches of an epoch, in the same order on all workers."""
        generators = list(_generators(self.source))
        states = [generator.get_state() for generator in generators]
        with isolate_rng(include_cuda=False):
            seed = (self._seed + epoch) % 2**32
            for generator in (torch.default_generator, *generators):
                generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            batches = list(self.source)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        return batches


def generators_of(loader: Any) -> Iterator[torch.Generator]:
    """The generators of a ``DataLoader`` and its samplers."""
    if isinstance(loader, DataLoader):
        if loader.generator is not None:
            yield loader.generator
        yield from _generators(loader.batch_sampler if loader.batch_sampler is not None else loader.sampler)


def _generators(sampler: Any) -> Iterator[torch.Generator]:
    """The generators of a sampler and of its inner samplers: the user's own and Lightning's wrappers."""
    if isinstance(getattr(sampler, "generator", None), torch.Generator):
        yield sampler.generator
    for name in ("sampler", "_sampler", "dataset"):
        inner = getattr(sampler, name, None)
        if isinstance(inner, (Sampler, DatasetSamplerWrapper)):
            yield from _generators(inner)


def count_samples(batch: Any) -> int:
    """Number of samples in a batch: by its own attribute, or by the length of its first tensor; 0 without one."""
    for name in ("num_graphs", "batch_size"):
        said = getattr(batch, name, None)
        if isinstance(said, int):
            return said
    try:
        return next(extract_batch_sizes(batch), None) or 0
    except RecursionError:
        return 0
