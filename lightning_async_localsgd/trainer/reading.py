"""Making and reading of data as under DDP: ``torch.distributed`` then has the rank and size to divide it by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_async_localsgd.data.loader import UnderWay
from lightning_async_localsgd.internals import DataFetcher, EvaluationLoop, FitLoop
from lightning_async_localsgd.trainer.mixing import mix_in, mix_out
from lightning_async_localsgd.trainer.process_groups import Groups

__all__ = ["Reading"]


class Reading:
    """Sets the process group while the loops of a trainer make and read data.

    Training data is divided by the processes of the job, validation data by the processes of the validating worker.

    Args:
        groups: the process groups.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self.by_loop = False
        """Whether the training loop reads, and not a hook."""

    def watch(self, trainer: pl.Trainer) -> None:
        """Watch a trainer's loops, until :meth:`leave`."""
        mix_in(trainer.fit_loop, _ReadingFitLoop, reading=self)
        mix_in(trainer.fit_loop.epoch_loop.val_loop, _ReadingValidationLoop, reading=self)

    def leave(self, trainer: pl.Trainer) -> None:
        """Restore the loops."""
        mix_out(trainer.fit_loop)
        mix_out(trainer.fit_loop.epoch_loop.val_loop)

    @contextmanager
    def training_data(self) -> Iterator[None]:
        """In the body the training loop makes or reads data."""
        before, self.by_loop = self.by_loop, True
        try:
            with self._groups.of_job():
                yield
        finally:
            self.by_loop = before

    @contextmanager
    def validation_data(self) -> Iterator[None]:
        """In the body the validation loop makes or reads data."""
        with self._groups.of_worker():
            yield

    def batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, each read within :meth:`training_data`."""
        return UnderWay(self._batches(batches))

    def _batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.training_data():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


class _ReadLoaders:
    """Loaders as the training loop reads them."""

    def __init__(self, loaders: Any, reading: Reading) -> None:
        self._loaders = loaders
        self._reading = reading

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaders, name)

    def __len__(self) -> int:
        return len(self._loaders)

    def __iter__(self) -> Iterator[Any]:
        with self._reading.training_data():
            batches = iter(self._loaders)
        return self._reading.batches(batches)


class _ReadingFitLoop(FitLoop):
    reading: Reading

    @override
    def setup_data(self) -> None:
        with self.reading.training_data():
            super().setup_data()
        fetcher = self._data_fetcher
        if fetcher is not None and not isinstance(fetcher, _ReadingFetcher):
            mix_in(fetcher, _ReadingFetcher, reading=self.reading)
            if fetcher.iterator is not None:
                fetcher.iterator = self.reading.batches(fetcher.iterator)


class _ReadingFetcher(DataFetcher):
    reading: Reading

    @property
    @override
    def combined_loader(self) -> Any:
        return _ReadLoaders(super().combined_loader, self.reading)


class _ReadingValidationLoop(EvaluationLoop):
    reading: Reading

    @override
    def setup_data(self) -> None:
        with self.reading.validation_data():
            super().setup_data()

    @override
    def run(self) -> Any:
        with self.reading.validation_data():
            return super().run()
