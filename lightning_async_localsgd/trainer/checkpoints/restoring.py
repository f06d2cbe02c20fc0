"""The resuming of a ``fit``: the search for a complete checkpoint, and each worker's shard of it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_async_localsgd.data.division import merge_positions
from lightning_async_localsgd.trainer.checkpoints.files import CompleteCheckpoint, find_complete, not_seen, read_shard
from lightning_async_localsgd.trainer.checkpoints.resumed import Resumed
from lightning_async_localsgd.trainer.checkpoints.saving import KEY
from lightning_async_localsgd.trainer.fetches import SavedFetches
from lightning_async_localsgd.trainer.fit import Place

__all__ = ["Restoring"]


class Restoring:
    """Finds the last complete checkpoint and assembles each worker's shard of it. All processes make the same calls.

    Args:
        place: the place of this process.
        read_file: reads a Lightning file, given its path and ``weights_only``.
        broadcast: broadcasts a value from the process of rank ``src``.
        weights_only: whether to unpickle only tensors and plain values; None: True.
    """

    def __init__(
        self,
        place: Place,
        read_file: Callable[[str, bool | None], dict[str, Any]],
        broadcast: Callable[..., Any],
        weights_only: bool | None,
    ) -> None:
        self._place = place
        self._read_file = read_file
        self._broadcast = broadcast
        self._weights_only = weights_only

    def restore(self, path: str) -> tuple[dict[str, Any], Resumed]:
        """The checkpoint for Lightning, with this worker's shard in place of worker 0's, and the library's own part.

        Args:
            path: a Lightning file.

        Raises:
            FileNotFoundError: if a worker does not see its shard, which worker 0 sees.
        """
        checkpoint, complete = self._find(path)
        entry = checkpoint.get(KEY, {})
        if "state" not in entry:
            fetches = SavedFetches(_take_positions(checkpoint), stateful_only=True)
            return checkpoint, Resumed(None, entry.get("job_steps"), fetches=fetches)
        workers = self._place.workers
        shards = _Shards(checkpoint, complete, self._place, self._weights_only)
        if complete is not None:
            shards.merge_positions()
        if "id" not in entry:
            reason = "was written when the other workers had left"
        elif complete is None:
            reason = "does not have every worker's shard"
        elif entry["workers"] != workers:
            reason = f"was written by {entry['workers']} workers, and there are {workers} now"
        else:
            own = shards.take_own()
            # The worker's own counts in that fit continue.
            return checkpoint, Resumed(
                entry["state"],
                entry["steps_before_fit"],
                own["worker"],
                own["scheduler_steps"],
                shards.fetches(own),
                entry.get("settings"),
            )
        rank_zero_warn(
            f"The checkpoint {path} {reason}. Training goes on from its global parameters and outer state: inner "
            "optimizers start as worker 0's was, and what had been learned since each worker's last push is lost."
        )
        fetches = SavedFetches(shards.shared_places())
        return checkpoint, Resumed(entry["state"], entry["job_steps"], fetches=fetches, settings=entry.get("settings"))

    def _find(self, path: str) -> tuple[dict[str, Any], CompleteCheckpoint | None]:
        """The Lightning file to resume from, and the checkpoint with its shards; None: it has no shards."""
        checkpoint, unreadable = self._read(path)
        if checkpoint is not None and "id" not in checkpoint.get(KEY, {}):
            return checkpoint, None
        problem = unreadable
        for complete in self._complete_checkpoints(path, None if checkpoint is None else checkpoint[KEY]["id"]):
            own = complete.path == os.path.realpath(path)
            if not own:
                rank_zero_warn(
                    f"The checkpoint {path} is not complete: {problem or 'not every worker had written its shard'}. "
                    f"Training goes on from the one before it, {complete.path}."
                )
            problem = self._problem(complete)
            if not problem:
                return checkpoint if own and checkpoint is not None else self._read_file(
                    complete.path, self._weights_only
                ), complete
        if checkpoint is None:
            return self._read_file(path, self._weights_only), None  # raises the reason if it cannot be read
        if problem:
            rank_zero_warn(f"The checkpoint {path} is not complete: {problem}.")
        return checkpoint, None

    def _read(self, path: str) -> tuple[dict[str, Any] | None, str]:
        """The Lightning file, or the reason for which worker 0 cannot read it; the same on all workers."""
        checkpoint, problem = None, ""
        if self._place.global_rank == 0:
            try:
                checkpoint = self._read_file(path, self._weights_only)
            except Exception as error:
                problem = f"{path} cannot be read ({type(error).__name__}: {error})"
        problem = self._broadcast(problem)
        if checkpoint is None and not problem:
            checkpoint = self._read_file(path, self._weights_only)
        return checkpoint, problem

    def _complete_checkpoints(self, path: str, checkpoint_id: str | None) -> list[CompleteCheckpoint]:
        """The complete checkpoints seen by worker 0; others may see a shared folder later, or never."""
        seen = []
        if self._place.global_rank == 0 and "://" not in path:
            seen = [[complete.path, complete.folder, complete.files] for complete in find_complete(path, checkpoint_id)]
        return [
            CompleteCheckpoint(
                leader, folder, {name: None if record is None else (record[0], record[1]) for name, record in f.items()}
            )
            for leader, folder, f in self._broadcast(seen)
        ]

    def _problem(self, complete: CompleteCheckpoint) -> str:
        """The reason for which some worker cannot resume from a checkpoint, gathered from all."""
        own = complete.problem(self._place.worker_rank) if self._place.device_rank == 0 else ""
        problems = [self._broadcast(own, src=worker * self._place.worker_size) for worker in range(self._place.workers)]
        for worker, problem in enumerate(problems):
            if worker > 0 and not problems[0] and problem.endswith("is missing"):
                raise FileNotFoundError(not_seen(problem.removesuffix(" is missing")))
        return next(filter(None, problems), "")


class _Shards:
    """The shards of a checkpoint, for this process.

    Args:
        checkpoint: the content of the Lightning file; it is modified.
        complete: the checkpoint with the other shards.
        place: the place of this process.
        weights_only: as for :class:`Restoring`.
    """

    def __init__(
        self,
        checkpoint: dict[str, Any],
        complete: CompleteCheckpoint | None,
        place: Place,
        weights_only: bool | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._folder = Path(complete.folder if complete is not None else "")
        self._place = place
        self._weights_only = weights_only
        self._saved_by: int = checkpoint[KEY]["workers"]
        self._places = _places(checkpoint, checkpoint[KEY])  # of worker 0's loaders, or merged
        _take_positions(checkpoint)

    def take_own(self) -> Mapping[str, Any]:
        """Put this worker's own state into the checkpoint. Returns the part that is not Lightning's."""
        checkpoint = self._checkpoint
        if self._place.worker_rank == 0:
            entry: dict[str, Any] = checkpoint[KEY]
            return entry
        shard = read_shard(self._folder, self._place.worker_rank, self._weights_only)
        own = shard.pop("checkpoint")
        # Schedulers that watch worker 0's metrics continue from worker 0's state.
        own["lr_schedulers"] = [
            theirs if "num_bad_epochs" in theirs else ours
            for theirs, ours in zip(checkpoint["lr_schedulers"], own["lr_schedulers"], strict=True)
        ]
        _take_positions(own)
        # The states of callbacks that only worker 0 runs are in its shard alone.
        own["callbacks"] = checkpoint["callbacks"] | own.get("callbacks", {})
        checkpoint |= own
        return shard

    def fetches(self, own: Mapping[str, Any]) -> SavedFetches:
        """The position of this process in its data.

        Args:
            own: the result of :meth:`take_own`.
        """
        devices = own.get("fetches", ())
        device = self._place.device_rank
        if device >= len(devices):
            return SavedFetches(self._places)
        fetches = devices[device]
        if device > 0:
            fetches = torch.load(io.BytesIO(bytes(fetches.numpy())), map_location="cpu", weights_only=True)
        places = [
            merged if "division" in merged else own_place
            for merged, own_place in zip(self._places, fetches["loaders"], strict=True)
        ]
        return SavedFetches(places, fetches["random"])

    def shared_places(self) -> list[dict[str, Any]]:
        """Positions of loaders that all workers share; a position of a worker's own loader is useless to others."""
        return [place if "division" in place else {} for place in self._places]

    def merge_positions(self) -> None:
        """Make the training loaders leave out the batches trained by any worker."""
        shared = any("trained" in place.get("division", ()) for place in self._places)
        if not shared and self._saved_by == self._place.workers:
            own = self._place.worker_rank
            if own > 0:  # the worker's own positions, also in checkpoints that hold them in Lightning's way
                shard = read_shard(self._folder, own, self._weights_only, mmap=True)
                self._places = _places(shard["checkpoint"], shard)
            return
        shards = [read_shard(self._folder, other, self._weights_only, mmap=True) for other in range(1, self._saved_by)]
        checkpoints = [self._checkpoint, *(shard["checkpoint"] for shard in shards)]
        of_all = [self._places, *(_places(shard["checkpoint"], shard) for shard in shards)]
        own = self._place.worker_rank
        if self._saved_by != self._place.workers:
            # All continue as the worker furthest behind, so that none has left an epoch too early.
            own = min(range(self._saved_by), key=lambda other: _epochs_over(checkpoints[other]["loops"], of_all[other]))
            self._checkpoint |= {key: checkpoints[own][key] for key in ("loops", "lr_schedulers")}
            _take_positions(self._checkpoint)
        self._places = of_all[own]
        if len({len(places) for places in of_all}) == 1:
            self._places = [_merge(places, own) for places in zip(*of_all, strict=True)]


def _merge(places: tuple[dict[str, Any], ...], own: int) -> dict[str, Any]:
    if not all("division" in place for place in places):
        return places[own]
    return {"division": merge_positions([place["division"] for place in places], own)}


def _places(checkpoint: Mapping[str, Any], shard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The positions of a worker's training loaders: in this library's part of a shard, formerly in Lightning's.

    Args:
        checkpoint: Lightning's part.
        shard: this library's part.
    """
    if "fetches" in shard:
        places: list[dict[str, Any]] = shard["fetches"][0].get("loaders", [])
        copies: list[dict[str, Any]] = apply_to_collection(places, Tensor, Tensor.clone)
        return copies  # the file may be deleted before they are read
    states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    return [{"division": s} if "trained" in s or "cursors" in s else {"loader": s} for s in states]


def _take_positions(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Remove the positions of loaders with a ``state_dict`` from Lightning's part: each worker has its own."""
    loops = checkpoint.get("loops")
    if loops is None:
        return []
    states = loops["fit_loop"]["state_dict"].pop("combined_loader", [])
    ended = loops["fit_loop"].get("epoch_loop.batch_progress", {}).get("is_last_batch", False)
    return [] if ended else [{"loader": state} for state in states]


def _epochs_over(loops: Mapping[str, Any], places: list[dict[str, Any]]) -> tuple[int, int]:
    """Number of epochs that a worker has ended, in its loop and in its leases."""
    over = [place["division"]["over"][0] for place in places if "over" in place.get("division", ())]
    in_leases = min((epoch if epoch is not None else -1 for epoch in over), default=-1)
    return loops["fit_loop"]["epoch_progress"]["current"]["processed"], in_leases
