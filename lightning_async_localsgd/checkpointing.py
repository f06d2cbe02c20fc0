"""What a checkpoint of a job holds, and who saves and restores it. Where it is written: ``checkpoint_files.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_async_localsgd.checkpoint_files import (
    CheckpointFiles,
    find_whole,
    link_part,
    new_id,
    read_part,
    write_part,
)
from lightning_async_localsgd.crew import FollowingRank
from lightning_async_localsgd.data import merge_positions
from lightning_async_localsgd.exchange.header import Message
from lightning_async_localsgd.worker import Worker

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_async_localsgd.strategy import AsyncLocalSGDStrategy

__all__ = ["KEY", "JobCheckpoints", "Resumed"]

KEY = "async_localsgd"
"""Where this library's entry is in a Lightning checkpoint."""
_OWN = ("optimizer_states", "lr_schedulers", "loops", "callbacks")
"""What of a Lightning checkpoint is each worker's own, beside its precision plugin's state."""


@dataclass(frozen=True)
class Resumed:
    """What a ``fit`` goes on from."""

    state: Mapping[str, Any]
    """The global state and shared progress, as ``Worker.global_state_dict`` gave it."""
    steps_before_fit: int
    """Steps of the job that the counts in ``state`` do not hold."""
    worker: Mapping[str, Any] | None = None
    """This worker's own state, as ``Worker.local_state_dict`` gave it; None: workers start from the global one."""
    scheduler_steps: int = 0
    """Steps of the job that the learning-rate schedulers have made."""

    def load_into(self, worker: Worker) -> None:
        """Have a worker that has not started go on from here."""
        worker.load_global_state_dict(self.state, same_workers=self.worker is not None)
        if self.worker is not None:
            worker.load_local_state_dict(self.worker)


class JobCheckpoints:
    """Saves and restores a worker's part in a job, as Lightning asks the strategy to.

    Worker 0 decides: it asks all for a cut of the exchange, and each worker saves its side of that moment. Checkpoints
    that follow before worker 0's next step hold the same moment, so that nobody is asked again.

    Args:
        strategy: whose worker it is.
        delete: deletes a Lightning file.
    """

    def __init__(self, strategy: AsyncLocalSGDStrategy, delete: Callable[[str], None]) -> None:
        self._strategy = strategy
        self._delete = delete
        self._tensors: dict[str, Tensor] = {}  # the global ones in the checkpoint that is being made
        self._moment: dict[str, Any] | None = None

    @cached_property
    def files(self) -> CheckpointFiles:
        """Worker 0's books of what is written."""
        return CheckpointFiles(self._delete, self._strategy.workers)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def put_global(self, state: dict[str, Any]) -> dict[str, Any]:
        """Put the global parameters in the place of the worker's own in a module's ``state_dict``."""
        if isinstance(self._worker, Worker):
            self._tensors = self._worker.global_tensors()
            for shared, aliases in _aliases(self._module).items():
                if shared in self._tensors:
                    state.update({name: self._tensors[shared] for name in aliases if name in state})
        return state

    def save(self, checkpoint: dict[str, Any], path: str) -> None:
        """Write a checkpoint of the whole job. All ranks of worker 0 call this at the same step."""
        if isinstance(self._worker, FollowingRank):
            if self._moment is None:
                self._worker.follow()
                self._moment = {}
            return
        checkpoint_id = new_id()
        entry = self._take_moment({"id": checkpoint_id, "path": path})
        state, tensors = entry["state"], entry["state"]["global"]["tensors"]
        for name, tensor in tensors.items():  # an update may have come since they were put into the checkpoint
            self._tensors[name].copy_(tensor)
        written_once = state["global"] | {"tensors": dict(self._tensors)}
        checkpoint[KEY] |= entry | {"id": checkpoint_id, "state": state | {"global": written_once}}
        self.files.begin(path, checkpoint_id)
        self._io.save_checkpoint(checkpoint, path)

    @cached_property
    def _io(self) -> CheckpointIO:
        """Writes worker 0's file as the user's plugin does, in the background if that does."""
        io = self._strategy.checkpoint_io
        if isinstance(io, AsyncCheckpointIO) and io.checkpoint_io is not None:
            return AsyncCheckpointIO(_LeaderFile(io.checkpoint_io, self.files))
        return _LeaderFile(io, self.files)

    def wait_until_written(self) -> None:
        """Wait for what is being written in the background.

        Raises:
            Exception: what it has failed of.
        """
        self._io.teardown()

    def _take_moment(self, where: Message) -> dict[str, Any]:
        """This library's entry in a checkpoint of now, or of the moment that the others have saved already."""
        assert isinstance(self._worker, Worker)
        if self._moment is not None:
            self._worker.send({"also": [self._moment["where"], where]})
            entry: dict[str, Any] = self._moment["entry"]
            return entry
        with self._worker.cut(where):
            entry = {
                "job_steps": self._strategy.job_steps,
                "steps_before_fit": self._strategy.steps_before_fit(self._module.trainer),
                "state": self._worker.global_state_dict(),
                "worker": self._worker.local_state_dict(),
                "scheduler_steps": self._strategy.scheduler_steps,
            }
        self._moment = {"where": where, "entry": entry}
        return entry

    def forget_moment(self) -> None:
        """A checkpoint that is written from now on is of another moment than the last one."""
        self._moment = None
        self._tensors = {}

    def save_part(self, what: Message) -> None:
        """Write this worker's side of the checkpoint that worker 0 writes."""
        assert isinstance(self._worker, Worker)
        part = {"worker": self._worker.local_state_dict(), "scheduler_steps": self._strategy.scheduler_steps}
        trainer = self._module.trainer
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        precision = type(trainer.precision_plugin).__qualname__
        own = {key: checkpoint[key] for key in (*_OWN, precision) if key in checkpoint}
        write_part(what["path"], what["id"], self._strategy.worker_rank, part | {"checkpoint": own})
        self._worker.send({"saved": what["id"]})

    def save_part_again(self, before: Message, again: Message) -> None:
        """Make this worker's side of one checkpoint that of another one as well, which worker 0 has just written."""
        if isinstance(self._worker, Worker):
            rank = self._strategy.worker_rank
            link_part(before["path"], before["id"], again["path"], again["id"], rank)
            self._worker.send({"saved": again["id"]})

    # ---- restoring --------------------------------------------------------------------------------------------------

    def load(self, checkpoint: dict[str, Any], path: str, weights_only: bool | None) -> tuple[dict[str, Any], Resumed]:
        """Put this worker's side of a checkpoint in the place of worker 0's. All processes call this.

        Args:
            checkpoint: the Lightning file at ``path``.
            path: where it is.
            weights_only: whether to unpickle nothing but tensors and plain values; None: so.

        Returns:
            The checkpoint for Lightning to restore from, and what the worker goes on from.

        Raises:
            FileNotFoundError: if worker 0 sees this worker's side and this worker does not.
        """
        # Worker 0 says what is there, for all: others may see a shared folder later, or not at all.
        whole = find_whole(path, checkpoint[KEY].get("id"))
        leader, folder = self._strategy.broadcast(
            [str(whole.path), str(whole.folder)] if whole is not None else ["", ""]
        )
        if leader and leader != os.path.realpath(path):
            rank_zero_warn(
                f"The checkpoint {path} is not whole: the job ended before every worker had written its side. Training "
                "goes on from the one that it was to replace."
            )
            checkpoint = self._strategy.read_checkpoint(leader, weights_only)
        entry, workers = checkpoint[KEY], self._strategy.workers
        if leader:
            self._merge_positions(checkpoint, Path(folder), weights_only)
        if "id" not in entry:
            reason = "was written when the other workers had left"
        elif not leader:
            reason = "does not have every worker's side"
        elif entry["workers"] != workers:
            reason = f"was written by {entry['workers']} workers, and there are {workers} now"
        else:
            own = self._load_part(checkpoint, Path(folder), weights_only)
            # The worker's own counts of that fit go on.
            return checkpoint, Resumed(entry["state"], entry["steps_before_fit"], own["worker"], own["scheduler_steps"])
        rank_zero_warn(
            f"The checkpoint {path} {reason}. Training goes on from its global parameters and outer state: inner "
            "optimizers start as worker 0's was, and what had been learned since each worker's last push is lost."
        )
        return checkpoint, Resumed(entry["state"], entry["job_steps"])

    def _load_part(self, checkpoint: dict[str, Any], folder: Path, weights_only: bool | None) -> Mapping[str, Any]:
        """Put this worker's own into the checkpoint, and return what is not Lightning's."""
        if self._strategy.worker_rank == 0:
            entry: dict[str, Any] = checkpoint[KEY]
            return entry
        part = read_part(folder, self._strategy.worker_rank, weights_only)
        own = part.pop("checkpoint")
        # What watches worker 0's metrics goes on as on worker 0.
        own["lr_schedulers"] = [
            theirs if "num_bad_epochs" in theirs else ours
            for theirs, ours in zip(checkpoint["lr_schedulers"], own["lr_schedulers"], strict=True)
        ]
        _set_positions(own["loops"], _positions(checkpoint["loops"]))
        # What only worker 0 runs, and decides by, is in its side alone.
        own["callbacks"] = checkpoint["callbacks"] | own.get("callbacks", {})
        checkpoint |= own
        return part

    def _merge_positions(self, checkpoint: dict[str, Any], folder: Path, weights_only: bool | None) -> None:
        """Have the training loaders leave out what any worker has trained on."""
        workers = checkpoint[KEY]["workers"]
        shared = any("trained" in position for position in _positions(checkpoint["loops"]))
        if not shared and workers == self._strategy.workers:
            return
        parts = [read_part(folder, worker, weights_only)["checkpoint"] for worker in range(1, workers)]
        sides = [{key: side[key] for key in ("loops", "lr_schedulers")} for side in (checkpoint, *parts)]
        of_all = [_positions(side["loops"]) for side in sides]
        own = self._strategy.worker_rank
        if workers != self._strategy.workers:
            # All go on as the one that was furthest behind, so that nobody has left an epoch too early.
            own = min(range(workers), key=lambda worker: _epochs_over(sides[worker]["loops"]))
            checkpoint |= sides[own]
        merged = of_all[own]
        if len({len(positions) for positions in of_all}) == 1:
            merged = [merge_positions(states, own) for states in zip(*of_all, strict=True)]
        _set_positions(checkpoint["loops"], merged)

    @property
    def _worker(self) -> Worker | FollowingRank:
        worker = self._strategy.worker
        assert worker is not None
        return worker

    @property
    def _module(self) -> pl.LightningModule:
        module = self._strategy.lightning_module
        assert module is not None
        return module


class _LeaderFile(_WrappingCheckpointIO):
    """Writes a Lightning file to where worker 0's side belongs, and enters it in the books.

    Args:
        checkpoint_io: how it is written.
        files: the books.
    """

    def __init__(self, checkpoint_io: CheckpointIO, files: CheckpointFiles) -> None:
        super().__init__(checkpoint_io)
        self._files = files

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        assert self.checkpoint_io is not None
        with self._files.write(path, checkpoint[KEY]["id"]) as leader:
            self.checkpoint_io.save_checkpoint(checkpoint, leader)

    @override
    def teardown(self) -> None:
        """The user's plugin ends with the strategy."""


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """The first name of each parameter and buffer, and all names it goes by.

    Tied weights have several, and so have parameters that are views of the same memory.
    """
    names: dict[Any, list[str]] = {}
    for name, tensor in chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    ):
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)
        names.setdefault(place, []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def _positions(loops: dict[str, Any]) -> list[dict[str, Any]]:
    """Where a worker's training loaders are, in its loops' state."""
    positions: list[dict[str, Any]] = loops["fit_loop"]["state_dict"].get("combined_loader", [])
    return positions


def _set_positions(loops: dict[str, Any], positions: list[dict[str, Any]]) -> None:
    loops["fit_loop"]["state_dict"]["combined_loader"] = positions


def _epochs_over(loops: dict[str, Any]) -> tuple[int, int]:
    """Epochs that are over for a worker, in its loop and in its leases."""
    over = [position["over"][0] for position in _positions(loops) if "over" in position]
    in_leases = min((epoch if epoch is not None else -1 for epoch in over), default=-1)
    return loops["fit_loop"]["epoch_progress"]["current"]["processed"], in_leases
