"""Where a process is in its training data, as checkpoints hold it: its loaders' places, and its random generators.

Lightning fetches a batch ahead where a loader has no length. A checkpoint counts such a batch as not fetched: the run
that goes on fetches it again, from the same place and with the same random numbers as the first time.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_async_localsgd.data.loader import UnderWay, WorkerLoader, count_samples, generators_of
from lightning_async_localsgd.data.random_state import RandomState, set_random_state
from lightning_async_localsgd.internals import Stateful, data_fetcher, fetched_loaders, training_loaders

__all__ = ["Fetches", "OpenEnded", "SavedFetches", "Watched", "fetched", "fetched_ahead", "samples_in_training"]


@dataclass(frozen=True)
class SavedFetches:
    """Where a process goes on."""

    loaders: list[dict[str, Any]]
    """By place (the first loader, the second one, ...): what :meth:`Fetches.state_dict` gave."""
    random: Mapping[str, Any] | None = None
    """The random generators: ``"now"``, and ``"ahead"``, before each fetch of a batch that was not trained yet; and
    whether the pass over the data had ``"ended"``, so that the next one begins with the numbers of now."""
    stateful_only: bool = False
    """Whether only loaders with a ``state_dict`` of their own are counted: so in files of other strategies."""


class _Begun(NamedTuple):
    """What a fetch began from."""

    random: RandomState
    places: list[dict[str, Any] | None]
    """Of the loaders, where they have a ``state_dict`` of their own."""


class Fetches:
    """Watches the fetches of a training loop, and has it go on from where a saved one was.

    Args:
        trainer: whose loop; its loaders are set up.
        device: an accelerator on which this process trains, or the CPU.
        saved: where to go on; None: at the beginning.
    """

    def __init__(self, trainer: pl.Trainer, device: torch.device, saved: SavedFetches | None = None) -> None:
        self._trainer = trainer
        self._device = device
        self._saved = saved
        self._random = None if saved is None else saved.random  # to be set, until the first step
        self._now_set = False
        self._to_set: deque[Mapping[str, Any]] = deque()  # random states, one for each of the next fetches
        self._began: deque[_Begun] = deque(maxlen=4)  # what the latest fetches began from

    # ---- going on ---------------------------------------------------------------------------------------------------

    def load_places(self) -> None:
        """Put the loaders where they were. To be called before they are iterated over for good."""
        if self._saved is None:
            return
        if all(isinstance(loader, (WorkerLoader, Stateful)) for loader in self._loaders):
            warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")  # Lightning cannot tell
        states = deque(self._saved.loaders)
        for loader in self._loaders:
            own = loader.original if isinstance(loader, WorkerLoader) else loader
            if states and (isinstance(own, Stateful) or not self._saved.stateful_only):
                _load_place(loader, states.popleft())

    def watch(self) -> None:
        """Watch the fetches from now on, if that is not so yet. A loop that goes on begins with those it was ahead."""
        fetcher = data_fetcher(self._trainer)
        if fetcher is None or isinstance(fetched_loaders(fetcher), OpenEnded):
            return
        loaders = training_loaders(self._trainer)
        assert loaders is not None
        fetcher.setup(Watched(loaders, self))  # type: ignore[arg-type]
        resuming, self._saved = self._saved is not None, None
        # What can be read once only has given its first batch already.
        if resuming and not any(isinstance(loader, Iterator) for loader in self._loaders):
            iter(fetcher)
        elif fetcher.iterator is not None:
            fetcher.iterator = self.watched(fetcher.iterator)

    def begin_step(self) -> None:
        """To be called when the batch of a step is there."""
        if self._random is not None and not self._now_set:  # a step that fetches its batches itself
            set_random_state(self._random["now"], self._device)
        self._random = None
        self._to_set.clear()

    def begin_pass(self) -> None:
        """To be called before the loaders are iterated over."""
        if self._random is not None and self._random["ended"]:
            set_random_state(self._random["now"], self._device)
            self._now_set = True

    # ---- watching ---------------------------------------------------------------------------------------------------

    def watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; what each fetch begins from is noted."""
        return UnderWay(self._watched(batches))

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        if self._random is not None and not self._random["ended"]:
            self._to_set = deque([*self._random["ahead"], self._random["now"]])
            self._now_set = False
        stateful = [loader if isinstance(loader, Stateful) else None for loader in self._loaders]
        while True:
            if self._to_set:
                set_random_state(self._to_set.popleft(), self._device)
                self._now_set = not self._to_set
            if self._ahead_of_training:
                places = [None if loader is None else loader.state_dict() for loader in stateful]
                self._began.append(_Begun(RandomState(self._device), places))
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    @property
    def _ahead_of_training(self) -> bool:
        fetcher = data_fetcher(self._trainer)
        return fetcher is not None and fetcher.length is None

    @property
    def _loaders(self) -> list[Any]:
        loaders = training_loaders(self._trainer)
        return [] if loaders is None else loaders.flattened

    def state_dict(self) -> dict[str, Any]:
        """Where this process is: fields of :class:`SavedFetches`. Fetches of batches not trained yet do not count."""
        ahead = fetched_ahead(self._trainer)
        began = list(self._began)[max(0, len(self._began) - ahead) :]
        places = began[0].places if began else [None] * len(self._loaders)
        ended = self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and ahead == 0
        return {
            "loaders": [_place(loader, before, ended) for loader, before in zip(self._loaders, places, strict=True)],
            "random": {
                "ahead": [fetch.random.state_dict() for fetch in began],
                "now": RandomState(self._device).state_dict(),
                "ended": ended,
            },
        }


def _place(loader: Any, before: Any, ended: bool) -> dict[str, Any]:
    """Where a loader is.

    Args:
        loader: the loader.
        before: its state before the batches were fetched that are not trained yet; None: there are none.
        ended: whether its pass is over.
    """
    if isinstance(loader, WorkerLoader):
        return {"division": loader.division_state()}
    place: dict[str, Any] = {"generators": [generator.get_state() for generator in generators_of(loader)]}
    if isinstance(loader, Stateful) and not ended:
        place["loader"] = before if before is not None else loader.state_dict()
    return place


def _load_place(loader: Any, place: Mapping[str, Any]) -> None:
    if isinstance(loader, WorkerLoader):
        loader.division.load_state_dict(place.get("division", {}))
        return
    for generator, state in zip(generators_of(loader), place.get("generators", ()), strict=False):
        generator.set_state(state)
    if "loader" in place and isinstance(loader, Stateful):
        loader.load_state_dict(place["loader"])


class OpenEnded:
    """Loaders as Lightning's loop goes through them, without a length: the end of an epoch comes when it comes.

    Args:
        loaders: the loaders, which have a length themselves (how many batches a worker gets on average).
        fetches: watches the fetches.
    """

    def __init__(self, loaders: CombinedLoader, fetches: Fetches) -> None:
        self.loaders = loaders
        self._fetches = fetches

    def __getattr__(self, name: str) -> Any:
        if name == "loaders":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.loaders, name)

    def __iter__(self) -> Iterator[Any]:
        self._fetches.begin_pass()
        return self._fetches.watched(iter(self.loaders))


class Watched(OpenEnded):
    """The same with the length that the loaders have."""

    def __len__(self) -> int:
        return len(self.loaders)


def fetched_ahead(trainer: pl.Trainer) -> int:
    """Batches that Lightning's loop holds and has not trained yet; also one whose step is under way, or has raised."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    ahead: int = len(getattr(data_fetcher(trainer), "batches", ()))
    return ahead + int(progress.ready > progress.processed)


def fetched(trainer: pl.Trainer) -> tuple[int, int]:
    """Batches that Lightning's loop has fetched in this epoch, and those of them that it has not trained yet."""
    return getattr(data_fetcher(trainer), "fetched", 0), fetched_ahead(trainer)


def samples_in_training(trainer: pl.Trainer, batch: Any) -> int:
    """Samples of the batch that has just been trained.

    A loader's sampler knows best: in a batch of graphs, the first tensor has an entry for each node.
    """
    loaders = training_loaders(trainer)
    if loaders is not None and len(loaders.flattened) == 1 and isinstance(loaders.flattened[0], WorkerLoader):
        samples = loaders.flattened[0].samples
        if samples is not None:
            return samples
    return count_samples(batch)
