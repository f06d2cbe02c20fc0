"""The position of a process in its training data, for checkpoints: its loaders' positions and random generators.

Lightning fetches a batch ahead if a loader has no length. A checkpoint counts such a batch as not fetched. The resumed
run fetches it again, from the same position and with the same random numbers.
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
    """A saved position of a process in its training data."""

    loaders: list[dict[str, Any]]
    """The state of each loader, in their order; from :meth:`Fetches.state_dict`."""
    random: Mapping[str, Any] | None = None
    """The random generators: ``"now"``, and ``"ahead"``, before each fetch of a batch not trained yet. ``"ended"``:
    whether the pass over the data had ended; the next pass then begins with the state ``"now"``."""
    stateful_only: bool = False
    """Whether ``loaders`` lists only loaders with a ``state_dict`` of their own, as in files of other strategies."""


class _Begun(NamedTuple):
    """The state before a fetch."""

    random: RandomState
    places: list[dict[str, Any] | None]
    """The state of each loader with a ``state_dict`` of its own."""


class Fetches:
    """Records the fetches of a training loop, and restores a saved position.

    Args:
        trainer: the trainer; its loaders must be set up.
        device: an accelerator on which this process trains, or the CPU.
        saved: the position to restore; None: the beginning.
    """

    def __init__(self, trainer: pl.Trainer, device: torch.device, saved: SavedFetches | None = None) -> None:
        self._trainer = trainer
        self._device = device
        self._saved = saved
        self._random = None if saved is None else saved.random  # set at the first step
        self._now_set = False
        self._to_set: deque[Mapping[str, Any]] = deque()  # random states, one for each of the next fetches
        self._began: deque[_Begun] = deque(maxlen=4)  # before the latest fetches

    # ---- restoring --------------------------------------------------------------------------------------------------

    def load_places(self) -> None:
        """Restore the loaders' positions. Call this before the iteration for training."""
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
        # A loader that can be read only once has already yielded its first batch.
        if resuming and not any(isinstance(loader, Iterator) for loader in self._loaders):
            iter(fetcher)
        elif fetcher.iterator is not None:
            fetcher.iterator = self.watched(fetcher.iterator)

    def begin_step(self) -> None:
        """Handle the start of a step; call this when its batch has been fetched."""
        if self._random is not None and not self._now_set:  # a step that fetches its batches itself
            set_random_state(self._random["now"], self._device)
        self._random = None
        self._to_set.clear()

    def begin_pass(self) -> None:
        """Handle the start of a pass; call this before the iteration over the loaders."""
        if self._random is not None and self._random["ended"]:
            set_random_state(self._random["now"], self._device)
            self._now_set = True

    # ---- recording --------------------------------------------------------------------------------------------------

    def watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the state before each fetch is recorded."""
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
        """The position: fields of :class:`SavedFetches`. Fetches of batches not trained yet do not count."""
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
    """The position of a loader.

    Args:
        loader: the loader.
        before: its state before the fetches of batches not trained yet; None: there are none.
        ended: whether its pass has ended.
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
    """Loaders for Lightning's loop, without a length: the epoch ends when the loaders do.

    Args:
        loaders: the loaders; their own length is the mean number of batches of a worker.
        fetches: records the fetches.
    """

    def __init__(self, loaders: CombinedLoader, fetches: Fetches) -> None:
        self.loaders = loaders
        self._fetches = fetches

    def __getattr__(self, name: str) -> Any:
        if name == "loaders":  # an unfinished copy has none yet
            raise AttributeError(name)
        return getattr(self.loaders, name)

    def __iter__(self) -> Iterator[Any]:
        self._fetches.begin_pass()
        return self._fetches.watched(iter(self.loaders))


class Watched(OpenEnded):
    """Loaders for Lightning's loop, with their length."""

    def __len__(self) -> int:
        return len(self.loaders)


def fetched_ahead(trainer: pl.Trainer) -> int:
    """Number of fetched batches of Lightning's loop without a completed step."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    ahead: int = len(getattr(data_fetcher(trainer), "batches", ()))
    return ahead + int(progress.ready > progress.processed)


def fetched(trainer: pl.Trainer) -> tuple[int, int]:
    """Batches that Lightning's loop has fetched in this epoch, and those of them that it has not trained yet."""
    return getattr(data_fetcher(trainer), "fetched", 0), fetched_ahead(trainer)


def samples_in_training(trainer: pl.Trainer, batch: Any) -> int:
    """Number of samples of the batch trained last.

    The loader's sampler takes precedence: in a batch of graphs the first tensor has an entry for each node.
    """
    loaders = training_loaders(trainer)
    if loaders is not None and len(loaders.flattened) == 1 and isinstance(loaders.flattened[0], WorkerLoader):
        samples = loaders.flattened[0].samples
        if samples is not None:
            return samples
    return count_samples(batch)
