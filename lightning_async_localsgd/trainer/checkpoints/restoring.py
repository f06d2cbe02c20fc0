"""What a ``fit`` goes on from: which checkpoint is whole, and each worker's own side of it."""

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
from lightning_async_localsgd.trainer.checkpoints.files import Whole, find_wholes, not_seen, read_part
from lightning_async_localsgd.trainer.checkpoints.resumed import Resumed
from lightning_async_localsgd.trainer.checkpoints.saving import KEY
from lightning_async_localsgd.trainer.fetches import SavedFetches
from lightning_async_localsgd.trainer.fit import Place

__all__ = ["Restoring"]


class Restoring:
    """Finds the last whole checkpoint and puts each worker's side of it together. All processes go through it alike.

    Args:
        place: the place of this process.
        read_file: reads a Lightning file, given its path and ``weights_only``.
        broadcast: gives all processes the value of one, given the value and, as ``src``, its rank.
        weights_only: whether to unpickle nothing but tensors and plain values; None: so.
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
        """What Lightning is to restore from, with this worker's side in the place of worker 0's, and the rest.

        Args:
            path: a Lightning file.

        Raises:
            FileNotFoundError: if a worker does not see its side, which worker 0 sees.
        """
        checkpoint, whole = self._find(path)
        entry = checkpoint.get(KEY, {})
        if "state" not in entry:
            fetches = SavedFetches(_take_positions(checkpoint), stateful_only=True)
            return checkpoint, Resumed(None, entry.get("job_steps"), fetches=fetches)
        workers = self._place.workers
        sides = _Sides(checkpoint, whole, self._place, self._weights_only)
        if whole is not None:
            sides.merge_positions()
        if "id" not in entry:
            reason = "was written when the other workers had left"
        elif whole is None:
            reason = "does not have every worker's side"
        elif entry["workers"] != workers:
            reason = f"was written by {entry['workers']} workers, and there are {workers} now"
        else:
            own = sides.take_own()
            # The worker's own counts of that fit go on.
            return checkpoint, Resumed(
                entry["state"],
                entry["steps_before_fit"],
                own["worker"],
                own["scheduler_steps"],
                sides.fetches(own),
                entry.get("settings"),
            )
        rank_zero_warn(
            f"The checkpoint {path} {reason}. Training goes on from its global parameters and outer state: inner "
            "optimizers start as worker 0's was, and what had been learned since each worker's last push is lost."
        )
        fetches = SavedFetches(sides.shared_places())
        return checkpoint, Resumed(entry["state"], entry["job_steps"], fetches=fetches, settings=entry.get("settings"))

    def _find(self, path: str) -> tuple[dict[str, Any], Whole | None]:
        """The Lightning file to go on from, and where the sides of it are; None: nowhere."""
        checkpoint, unreadable = self._read(path)
        if checkpoint is not None and "id" not in checkpoint.get(KEY, {}):
            return checkpoint, None
        problem = unreadable
        for whole in self._wholes(path, None if checkpoint is None else checkpoint[KEY]["id"]):
            own = whole.path == os.path.realpath(path)
            if not own:
                rank_zero_warn(
                    f"The checkpoint {path} is not whole: {problem or 'not every worker had written its side'}. "
                    f"Training goes on from the one before it, {whole.path}."
                )
            problem = self._problem(whole)
            if not problem:
                return checkpoint if own and checkpoint is not None else self._read_file(
                    whole.path, self._weights_only
                ), whole
        if checkpoint is None:
            return self._read_file(path, self._weights_only), None  # which says why it cannot be read
        if problem:
            rank_zero_warn(f"The checkpoint {path} is not whole: {problem}.")
        return checkpoint, None

    def _read(self, path: str) -> tuple[dict[str, Any] | None, str]:
        """The Lightning file, or why it cannot be read; worker 0 says so for all."""
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

    def _wholes(self, path: str, checkpoint_id: str | None) -> list[Whole]:
        """What worker 0 sees: others may see a shared folder later, or not at all."""
        seen = []
        if self._place.global_rank == 0 and "://" not in path:
            seen = [[whole.path, whole.folder, whole.files] for whole in find_wholes(path, checkpoint_id)]
        return [
            Whole(
                leader, folder, {name: None if record is None else (record[0], record[1]) for name, record in f.items()}
            )
            for leader, folder, f in self._broadcast(seen)
        ]

    def _problem(self, whole: Whole) -> str:
        """What keeps some worker from going on from there, as all tell each other."""
        own = whole.problem(self._place.worker_rank) if self._place.device_rank == 0 else ""
        problems = [self._broadcast(own, src=worker * self._place.worker_size) for worker in range(self._place.workers)]
        for worker, problem in enumerate(problems):
            if worker > 0 and not problems[0] and problem.endswith("is missing"):
                raise FileNotFoundError(not_seen(problem.removesuffix(" is missing")))
        return next(filter(None, problems), "")


class _Sides:
    """The sides of a checkpoint, as this process goes on from them.

    Args:
        checkpoint: the Lightning file, which is changed.
        whole: where the other sides are.
        place: the place of this process.
        weights_only: as for :class:`Restoring`.
    """

    def __init__(
        self,
        checkpoint: dict[str, Any],
        whole: Whole | None,
        place: Place,
        weights_only: bool | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._folder = Path(whole.folder if whole is not None else "")
        self._place = place
        self._weights_only = weights_only
        self._saved_by: int = checkpoint[KEY]["workers"]
        self._places = _places(checkpoint, checkpoint[KEY])  # of worker 0's loaders, or what has been merged
        _take_positions(checkpoint)

    def take_own(self) -> Mapping[str, Any]:
        """Put this worker's own into the checkpoint, and return what is not Lightning's."""
        checkpoint = self._checkpoint
        if self._place.worker_rank == 0:
            entry: dict[str, Any] = checkpoint[KEY]
            return entry
        part = read_part(self._folder, self._place.worker_rank, self._weights_only)
        own = part.pop("checkpoint")
        # What watches worker 0's metrics goes on as on worker 0.
        own["lr_schedulers"] = [
            theirs if "num_bad_epochs" in theirs else ours
            for theirs, ours in zip(checkpoint["lr_schedulers"], own["lr_schedulers"], strict=True)
        ]
        _take_positions(own)
        # What only worker 0 runs, and decides by, is in its side alone.
        own["callbacks"] = checkpoint["callbacks"] | own.get("callbacks", {})
        checkpoint |= own
        return part

    def fetches(self, own: Mapping[str, Any]) -> SavedFetches:
        """Where this process goes on in its data.

        Args:
            own: what :meth:`take_own` gave.
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
        """Places of loaders that all workers share; those of a worker's own mean nothing to another one."""
        return [place if "division" in place else {} for place in self._places]

    def merge_positions(self) -> None:
        """Have the training loaders leave out what any worker has trained on."""
        shared = any("trained" in place.get("division", ()) for place in self._places)
        if not shared and self._saved_by == self._place.workers:
            own = self._place.worker_rank
            if own > 0:  # places of the worker's own, also in checkpoints that hold them as Lightning does
                part = read_part(self._folder, own, self._weights_only, mmap=True)
                self._places = _places(part["checkpoint"], part)
            return
        parts = [read_part(self._folder, other, self._weights_only, mmap=True) for other in range(1, self._saved_by)]
        sides = [self._checkpoint, *(part["checkpoint"] for part in parts)]
        of_all = [self._places, *(_places(part["checkpoint"], part) for part in parts)]
        own = self._place.worker_rank
        if self._saved_by != self._place.workers:
            # All go on as the one that was furthest behind, so that nobody has left an epoch too early.
            own = min(range(self._saved_by), key=lambda worker: _epochs_over(sides[worker]["loops"], of_all[worker]))
            self._checkpoint |= {key: sides[own][key] for key in ("loops", "lr_schedulers")}
            _take_positions(self._checkpoint)
        self._places = of_all[own]
        if len({len(places) for places in of_all}) == 1:
            self._places = [_merge(places, own) for places in zip(*of_all, strict=True)]


def _merge(places: tuple[dict[str, Any], ...], own: int) -> dict[str, Any]:
    if not all("division" in place for place in places):
        return places[own]
    return {"division": merge_positions([place["division"] for place in places], own)}


def _places(checkpoint: Mapping[str, Any], side: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where a worker's training loaders are: this library's part of a side says so, or, once, Lightning's.

    Args:
        checkpoint: Lightning's part.
        side: this library's.
    """
    if "fetches" in side:
        places: list[dict[str, Any]] = side["fetches"][0].get("loaders", [])
        copies: list[dict[str, Any]] = apply_to_collection(places, Tensor, Tensor.clone)
        return copies  # the file may be gone when they are looked at
    states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    return [{"division": s} if "trained" in s or "cursors" in s else {"loader": s} for s in states]


def _take_positions(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Take out of Lightning's part where loaders with a ``state_dict`` are: each worker has its own, beside it."""
    loops = checkpoint.get("loops")
    if loops is None:
        return []
    states = loops["fit_loop"]["state_dict"].pop("combined_loader", [])
    ended = loops["fit_loop"].get("epoch_loop.batch_progress", {}).get("is_last_batch", False)
    return [] if ended else [{"loader": state} for state in states]


def _epochs_over(loops: Mapping[str, Any], places: list[dict[str, Any]]) -> tuple[int, int]:
    """Epochs that are over for a worker, in its loop and in its leases."""
    over = [place["division"]["over"][0] for place in places if "over" in place.get("division", ())]
    in_leases = min((epoch if epoch is not None else -1 for epoch in over), default=-1)
    return loops["fit_loop"]["epoch_progress"]["current"]["processed"], in_leases
