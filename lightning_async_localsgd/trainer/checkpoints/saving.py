"""The content of a job's checkpoints and its saving. Their files: ``files.py``."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from typing_extensions import override

from lightning_async_localsgd.internals import WrappingCheckpointIO, dump_checkpoint
from lightning_async_localsgd.protocol.messages import (
    CheckpointReplaced,
    CheckpointShardSaved,
    Cut,
    LinkCheckpointShard,
    SaveCheckpointShard,
)
from lightning_async_localsgd.trainer.checkpoints.files import CheckpointFiles, ShardFiles
from lightning_async_localsgd.trainer.checkpoints.writing import BackgroundWriter, FileRecord, save_with
from lightning_async_localsgd.trainer.fit import Fit, Phase
from lightning_async_localsgd.worker.rank import WorkerRank

__all__ = ["KEY", "JobCheckpoints", "is_local"]

KEY = "async_localsgd"
"""Key of this library's entry in a Lightning checkpoint."""
_OWN = ("optimizer_states", "lr_schedulers", "loops", "callbacks")
"""Entries of a Lightning checkpoint that are each worker's own, beside its precision plugin's state."""


class JobCheckpoints:
    """Saves a worker's shard of a job's checkpoints, at Lightning's request to the strategy.

    Worker 0 decides: it requests a cut of the exchange, and each worker saves its shard of that cut. Further
    checkpoints before worker 0's next step are of the same cut, without another request. Worker 0 writes its file
    before it continues, as Lightning does. The others copy their shard and write it in the background.

    Args:
        fit: the ``fit`` of this process.
        checkpoint_io: returns the plugin that writes Lightning files.
        delete: deletes a Lightning file.
    """

    def __init__(self, fit: Fit, checkpoint_io: Callable[[], CheckpointIO], delete: Callable[[str], None]) -> None:
        self._fit = fit
        self._checkpoint_io = checkpoint_io
        self._delete = delete
        self._tensors: dict[str, Tensor] = {}  # the global tensors in the checkpoint under construction
        self._cut: dict[str, Any] | None = None
        self._background = BackgroundWriter()
        self._saving_shard = False
        self._ending = False

    @cached_property
    def files(self) -> CheckpointFiles:
        """Worker 0's record of checkpoints."""
        return CheckpointFiles(self._delete, self._fit.place.workers, self._tell_replaced)

    @cached_property
    def _shard_files(self) -> ShardFiles:
        return ShardFiles(self._fit.place.worker_rank)

    # ---- worker 0 ---------------------------------------------------------------------------------------------------

    def put_global(self, state: dict[str, Any]) -> dict[str, Any]:
        """Put the global parameters in the place of the worker's own, if a module's ``state_dict`` holds these."""
        # After the last step the module's own: the global ones, or what callbacks have made of them.
        if self._fit.own_in_module and not self._saving_shard:
            if self._cut is None or not self._tensors:
                self._tensors = self._worker.global_tensors()
            for shared, aliases in _aliases(self._fit.trainer.lightning_module).items():
                if shared in self._tensors:
                    state.update({name: self._tensors[shared] for name in aliases if name in state})
        return state

    def save(self, checkpoint: dict[str, Any], filepath: Any, write: Callable[[dict[str, Any], Any], None]) -> None:
        """Write a checkpoint: of the whole job while workers train. All ranks of worker 0 call this at the same step.

        Args:
            checkpoint: the Lightning checkpoint.
            filepath: its path or URL.
            write: writes a Lightning checkpoint of this process alone.
        """
        fit = self._fit
        if fit.worker is None or fit.phase is Phase.MEETING or fit.place.worker_rank > 0:
            write(checkpoint, filepath)
            return
        # At the end of the run, or of a worker, nobody is left to ask.
        alone = fit.phase is Phase.FINISHED or fit.failed
        resumable, local = "optimizer_states" in checkpoint, is_local(filepath)
        with fit.worker.paused():
            if resumable and local and not alone:
                self._save_job(checkpoint, os.path.abspath(filepath))
                return
            self.wait_until_written()  # it may be of the same name
            if resumable and fit.worker.saved_state is not None:
                state = fit.worker.saved_state.global_state_dict()
                checkpoint[KEY] |= {"state": state, "fetches": [fit.fetches_state()]}
            write(checkpoint, filepath)
            if local and fit.place.global_rank == 0:
                self.files.forget(os.path.abspath(filepath))

    def _save_job(self, checkpoint: dict[str, Any], path: str) -> None:
        """Write a checkpoint of the whole job."""
        if self._worker.saved_state is None:
            self._mirror_cut(SaveCheckpointShard(path, ""))
            return
        checkpoint_id = self.files.begin(path)
        checkpoint[KEY] |= self._enter_cut(SaveCheckpointShard(path, checkpoint_id)) | {"id": checkpoint_id}
        self._io.save_checkpoint(checkpoint, path)

    def _mirror_cut(self, where: SaveCheckpointShard) -> None:
        """:meth:`_enter_cut` on another rank of worker 0 than the first."""
        if self._cut is None:
            with self._worker.cut(where):
                self._cut = {}

    @cached_property
    def _io(self) -> CheckpointIO:
        """The plugin for worker 0's file: writes with the user's plugin, in the background if that does."""
        io = self._checkpoint_io()
        if isinstance(io, AsyncCheckpointIO) and io.checkpoint_io is not None:
            return AsyncCheckpointIO(_LeaderFile(io.checkpoint_io, self.files, self._background))
        return _LeaderFile(io, self.files, self._background)

    def _enter_cut(self, where: SaveCheckpointShard) -> dict[str, Any]:
        """This library's entry in a checkpoint of a new cut, or of the cut that the others have saved already."""
        if self._cut is not None:
            before: SaveCheckpointShard = self._cut["where"]
            self._worker.send(LinkCheckpointShard(where.path, where.checkpoint_id, before.path, before.checkpoint_id))
            entry: dict[str, Any] = self._cut["entry"]
            return entry
        fetches = self._fetches()  # the other ranks of worker 0 follow until the cut
        saved = self._worker.saved_state
        assert saved is not None
        with self._worker.cut(where):
            entry = {
                "job_steps": self._fit.job_steps,
                "steps_before_fit": self._fit.steps_before_fit(),
                # An update may have come since they were put into the checkpoint.
                "state": saved.global_state_dict(self._tensors),
                "settings": self._fit.settings.fingerprint(),
                "worker": saved.local_state_dict(),
                "scheduler_steps": self._fit.scheduler_steps,
                "fetches": fetches,
            }
        self._cut = {"where": where, "entry": entry}
        return entry

    def forget_cut(self) -> None:
        """Require a new cut for the next checkpoint."""
        self._cut = None
        self._tensors = {}

    def hear_saved_shard(self, worker: int, message: CheckpointShardSaved) -> None:
        """Worker 0 is told that a worker has written its shard."""
        record = FileRecord(message.size, message.crc32)
        self._background.submit(self.files.shard_written, message.checkpoint_id, worker, record)

    def _tell_replaced(self, path: str, checkpoint_id: str | None) -> None:
        if self._fit.phase is Phase.MEETING:
            return  # the learning-rate finder removes its own before the workers start
        if self._fit.worker is not None and self._fit.place.workers > 1:
            self._fit.worker.send(CheckpointReplaced(path, checkpoint_id))

    # ---- the other workers ------------------------------------------------------------------------------------------

    def save_shard(self, what: Cut) -> None:
        """Save this worker's shard of the checkpoint that worker 0 writes."""
        saved = self._worker.saved_state
        assert saved is not None and isinstance(what, SaveCheckpointShard)
        state = {
            "worker": saved.local_state_dict(),
            "scheduler_steps": self._fit.scheduler_steps,
            "fetches": self._fetches(),
        }
        trainer = self._fit.trainer
        with self._saving():
            checkpoint = dump_checkpoint(trainer)
        precision = type(trainer.precision_plugin).__qualname__
        own = {key: checkpoint[key] for key in (*_OWN, precision) if key in checkpoint}
        shard = apply_to_collection(state | {"checkpoint": own}, Tensor, _copied)  # training continues meanwhile
        self._background.submit(self._write_shard, what, shard)
        if self._ending:  # messages after this worker's last header are lost
            self._background.wait()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        self._saving_shard = True
        try:
            yield
        finally:
            self._saving_shard = False

    def _write_shard(self, what: SaveCheckpointShard, shard: dict[str, Any]) -> None:
        try:
            record = self._shard_files.write(what.path, what.checkpoint_id, shard)
        except OSError as error:
            raise OSError(
                f"Worker {self._fit.place.worker_rank} could not write its shard of the checkpoint {what.path}: "
                f"{error}. Go on from the one before it, which is still there."
            ) from error
        self._tell_saved(what.checkpoint_id, record)

    def link_shard(self, what: LinkCheckpointShard) -> None:
        """Use this worker's shard of one checkpoint also for another one, which worker 0 has just written."""
        if self._worker.saved_state is not None:
            self._background.submit(self._link_shard, what)

    def _link_shard(self, what: LinkCheckpointShard) -> None:
        record = self._shard_files.link(what.saved_path, what.saved_id, what.path, what.checkpoint_id)
        self._tell_saved(what.checkpoint_id, record)

    def _tell_saved(self, checkpoint_id: str, record: FileRecord) -> None:
        if self._fit.worker is not None:
            self._fit.worker.send(CheckpointShardSaved(checkpoint_id, record.size, record.crc32))

    def forget_replaced(self, what: CheckpointReplaced) -> None:
        """Delete older shards: worker 0 has told that a checkpoint is complete, or that all of a name are gone."""
        if self._worker.saved_state is None:
            return
        if what.checkpoint_id is None:
            self._background.submit(self._shard_files.forget, what.path)
        else:
            self._background.submit(self._shard_files.forget_older, what.path, what.checkpoint_id)

    # ---- all --------------------------------------------------------------------------------------------------------

    def _fetches(self) -> list[Any]:
        """Where each process of the worker is in its data: this one's, and the others' as files of ``torch.save``."""
        return [self._fit.fetches_state(), *self._worker.gather_from_devices()]

    def pack_fetches(self) -> bytes:
        """The data position of a process other than the first of its worker, for :meth:`_fetches`."""
        buffer = io.BytesIO()
        torch.save(self._fit.fetches_state(), buffer)
        return buffer.getvalue()

    def check(self) -> None:
        """Raise an error of the background thread.

        Raises:
            Exception: the original error.
        """
        self._background.check()

    def prepare_to_end(self) -> None:
        """Finish writing and report it, before this worker's last exchange."""
        self._ending = True
        self._background.wait()

    def wait_until_written(self) -> None:
        """Wait for the background thread to finish writing.

        Raises:
            Exception: the error of a failed write.
        """
        if "_io" in vars(self):
            self._io.teardown()
        self._background.wait()

    @property
    def _worker(self) -> WorkerRank:
        worker = self._fit.worker
        assert worker is not None
        return worker


class _LeaderFile(WrappingCheckpointIO):
    """Writes a Lightning file to where worker 0's shard belongs, and enters it in the books.

    Args:
        checkpoint_io: the plugin that writes the file.
        files: the record of checkpoints.
        background: waits until the file is on the disk.
    """

    def __init__(self, checkpoint_io: CheckpointIO, files: CheckpointFiles, background: BackgroundWriter) -> None:
        super().__init__(checkpoint_io)
        self._files = files
        self._background = background

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoint_id = checkpoint[KEY]["id"]
        with self._files.write(path, checkpoint_id) as leader:
            record = save_with(self.checkpoint_io, checkpoint, Path(leader))
        self._background.submit(self._files.leader_written, checkpoint_id, record)

    @override
    def teardown(self) -> None:
        """Do nothing: the strategy ends the user's plugin."""


def is_local(path: Any) -> bool:
    """Whether the other workers' shards can be written beside it."""
    return "://" not in str(path)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """The first name of each parameter and buffer, and all of its names.

    Tied weights have several names, and so have parameters that are views of the same memory.
    """
    names: dict[Any, list[str]] = {}
    for name, tensor in chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    ):
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)
        names.setdefault(place, []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}
