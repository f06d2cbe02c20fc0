"""The files of a job's checkpoints: their paths, the order of writing, and the search for complete ones.

A checkpoint is the ordinary Lightning file ``name.ckpt``, with the global model, worker 0's shard and, under
``"async_localsgd"``, the outer state and shared progress (see ``saving.py``). Beside it, in
``name.ckpt.workers/<id>/``::

    leader.ckpt     the Lightning file (name.ckpt is a hard link to it): it outlives an overwritten name.ckpt
    worker-1.pt     inner optimizer, schedulers, loops, callbacks and unpushed progress of worker 1
    ...
    manifest.json   written last: with it, and with files of the sizes and checksums that it names, it is complete

The id begins with the run's. Each file is written under a temporary name and renamed. An older checkpoint is deleted
when its replacement is complete and on the disk: whenever a job dies, the last complete checkpoint exists.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_async_localsgd.trainer.checkpoints.writing import FileRecord, make_durable, write_file

__all__ = ["CheckpointFiles", "CompleteCheckpoint", "ShardFiles", "find_complete", "not_seen", "read_shard"]

_MANIFEST = "manifest.json"
_LEADER = "leader.ckpt"


class _Folders:
    """The checkpoint folders of each name that this run may delete: those that it found, and its own.

    Another job may write checkpoints of the same name at the same time; this run does not delete these.
    """

    def __init__(self) -> None:
        self._ids: dict[str, list[str]] = {}

    def begin(self, path: str, checkpoint_id: str) -> Path:
        """The folder of a new checkpoint."""
        ids = self._known(path)
        if checkpoint_id in ids:  # another worker has made it
            ids.remove(checkpoint_id)
        ids.append(checkpoint_id)
        folder = _folder(path) / checkpoint_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def take_older(self, path: str, checkpoint_id: str) -> list[Path]:
        """The folders older than this one."""
        ids = self._known(path)
        older = ids[: ids.index(checkpoint_id)] if checkpoint_id in ids else []
        del ids[: len(older)]
        return [_folder(path) / other for other in older]

    def take_all(self, path: str) -> list[Path]:
        """All folders of a name."""
        return [_folder(path) / checkpoint_id for checkpoint_id in self._ids.pop(path, None) or _found(path)]

    def _known(self, path: str) -> list[str]:
        return self._ids.setdefault(path, _found(path))


class ShardFiles:
    """The checkpoint files of one worker other than worker 0. Its checkpoint folder may be on another host.

    Args:
        worker: rank of the worker.
    """

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._folders = _Folders()

    def write(self, path: str, checkpoint_id: str, shard: Mapping[str, Any]) -> FileRecord:
        """Write the worker's shard of a checkpoint."""
        file = self._folders.begin(path, checkpoint_id) / _shard_name(self._worker)
        record = write_file(dict(shard), file)
        make_durable(file)
        return record

    def link(self, path: str, checkpoint_id: str, other_path: str, other_id: str) -> FileRecord:
        """Use the shard of one checkpoint also for another one."""
        name = _shard_name(self._worker)
        folder = self._folders.begin(other_path, other_id)
        aside = folder / f"{name}.tmp"
        _link(_folder(path) / checkpoint_id / name, aside)
        os.replace(aside, folder / name)
        make_durable(folder / name)
        return FileRecord.of(folder / name)

    def forget_older(self, path: str, checkpoint_id: str) -> None:
        """Delete the shards replaced by a checkpoint, when it is complete."""
        self._delete(path, self._folders.take_older(path, checkpoint_id))

    def forget(self, path: str) -> None:
        """Delete the shards of all checkpoints of this name."""
        self._delete(path, self._folders.take_all(path))

    def _delete(self, path: str, folders: list[Path]) -> None:
        for folder in folders:
            (folder / _shard_name(self._worker)).unlink(missing_ok=True)
            _remove_empty(folder)
        _remove_empty(_folder(path))


@dataclass
class _Unfinished:
    path: str
    files: dict[str, FileRecord] = field(default_factory=dict)


class CheckpointFiles:
    """Worker 0's record of checkpoints: those not complete yet, and those to delete when newer ones are complete.

    The training thread and background threads share it.

    Args:
        delete: deletes a Lightning file.
        workers: number of workers.
        on_replaced: called with a path and an id when that checkpoint is complete; with None as the id when all
            checkpoints of a name have been deleted.
    """

    def __init__(
        self,
        delete: Callable[[str], None],
        workers: int = 1,
        on_replaced: Callable[[str, str | None], None] | None = None,
    ) -> None:
        self._delete = delete
        self._workers = workers
        self._on_replaced = on_replaced
        self._run = uuid.uuid4().hex
        self._number = 0
        self._unfinished: dict[str, _Unfinished] = {}
        self._to_remove: list[str] = []
        self._folders = _Folders()
        self._lock = threading.RLock()

    def begin(self, path: str) -> str:
        """Begin a checkpoint. Returns its id.

        The older checkpoint of its name is kept until this one is complete.
        """
        with self._lock:
            if path in self._to_remove:  # the name is used again
                self._to_remove.remove(path)
            self._number += 1
            checkpoint_id = f"{self._run}-{self._number}"
            self._unfinished[checkpoint_id] = _Unfinished(path)
            return checkpoint_id

    @contextmanager
    def write(self, path: str, checkpoint_id: str) -> Iterator[Path]:
        """The path for writing worker 0's Lightning file. After the ``with`` it replaces the file at ``path``."""
        with self._lock:
            folder = self._folders.begin(path, checkpoint_id)
        yield folder / _LEADER
        aside = folder / "link.tmp"
        _link(folder / _LEADER, aside)
        os.replace(aside, path)

    def leader_written(self, checkpoint_id: str, record: FileRecord) -> None:
        """Record that worker 0's shard is written."""
        unfinished = self._unfinished.get(checkpoint_id)
        if unfinished is not None:
            make_durable(_folder(unfinished.path) / checkpoint_id / _LEADER)
            make_durable(Path(unfinished.path))
            self._written(checkpoint_id, _LEADER, record)

    def shard_written(self, checkpoint_id: str, worker: int, record: FileRecord) -> None:
        """Record that another worker's shard is written. With the last one the checkpoint is complete."""
        self._written(checkpoint_id, _shard_name(worker), record)

    def _written(self, checkpoint_id: str, name: str, record: FileRecord) -> None:
        with self._lock:
            unfinished = self._unfinished.get(checkpoint_id)
            if unfinished is None:
                return
            unfinished.files[name] = record
            if len(unfinished.files) == self._workers:
                self._finish(checkpoint_id, unfinished)

    def _finish(self, checkpoint_id: str, unfinished: _Unfinished) -> None:
        for earlier in list(self._unfinished):  # all reports are in: these will never be complete
            del self._unfinished[earlier]
            if earlier == checkpoint_id:
                break
        path, folder = unfinished.path, _folder(unfinished.path) / checkpoint_id
        problems = (_problem(folder / name, record.size) for name, record in unfinished.files.items())
        # Another host's file may become visible later, or never.
        if problem := next(
            (p for p in problems if p and "is missing" not in p), "" if folder.exists() else str(folder)
        ):
            warnings.warn(
                f"The checkpoint {path} is not complete: {problem}. The one before it stays. Look for another job that "
                "writes to the same name, and at the disk.",
                stacklevel=2,
            )
            return
        _write_manifest(folder, self._run, unfinished.files)
        for older in self._folders.take_older(path, checkpoint_id):
            shutil.rmtree(older, ignore_errors=True)
        if self._on_replaced is not None:
            self._on_replaced(path, checkpoint_id)
        self._remove_what_is_replaced()

    def remove(self, path: str) -> None:
        """Delete a checkpoint, now or when all newer ones are complete."""
        with self._lock:
            self._to_remove.append(path)
            self._remove_what_is_replaced()

    def _remove_what_is_replaced(self) -> None:
        while self._to_remove and not self._unfinished:
            path = self._to_remove.pop()
            self._delete(path)
            self.forget(path)

    def forget(self, path: str) -> None:
        """Delete older shards of a name: its Lightning file, if any, is of worker 0 alone."""
        for folder in self._folders.take_all(path):
            shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(_folder(path))
        if self._on_replaced is not None:
            self._on_replaced(path, None)


def _write_manifest(folder: Path, run: str, files: Mapping[str, FileRecord]) -> None:
    aside = folder / "manifest.tmp"
    aside.write_text(json.dumps({"run": run, "workers": len(files), "files": files}))
    make_durable(aside)
    os.replace(aside, folder / _MANIFEST)
    make_durable(folder)


@dataclass(frozen=True)
class CompleteCheckpoint:
    """A complete checkpoint: every worker has written its shard."""

    path: str
    """Path of the Lightning file."""
    folder: str
    """The folder of the workers' shards."""
    files: Mapping[str, tuple[int, int] | None]
    """Size and CRC-32 of each file, by name; None in checkpoints of older versions, which lack them."""

    def problem(self, worker: int) -> str:
        """The reason for which a worker cannot resume from this checkpoint; empty if it can.

        Worker 0 reads its own file and checks the sizes of all files that it sees. Other workers read their own shards.
        """
        if worker == 0:
            own = self.files[_LEADER]
            problems = [_problem(Path(self.path), *(own or ()))]
            shards = {name: record for name, record in self.files.items() if name != _LEADER}
            problems += [_problem(Path(self.folder) / name, *(record or ())[:1]) for name, record in shards.items()]
            return next(filter(None, problems), "")
        name = _shard_name(worker)
        return _problem(Path(self.folder) / name, *(self.files[name] or ())) if name in self.files else ""


def find_complete(path: str, checkpoint_id: str | None) -> list[CompleteCheckpoint]:
    """The checkpoint itself if it has a manifest; then the older ones that it was to replace, newest first.

    Args:
        path: a Lightning file.
        checkpoint_id: its id; None if it cannot be read.
    """
    path = os.path.realpath(path)  # "last" may be a link
    found: list[CompleteCheckpoint] = []
    for manifest in sorted(_folder(path).glob(f"*/{_MANIFEST}"), key=lambda m: m.stat().st_mtime, reverse=True):
        folder = manifest.parent
        files = _read_manifest(manifest)
        if folder.name == checkpoint_id:
            found.insert(0, CompleteCheckpoint(path, str(folder), files))
        elif (folder / _LEADER).exists():
            found.append(CompleteCheckpoint(str(folder / _LEADER), str(folder), files))
    return found


def _read_manifest(manifest: Path) -> dict[str, tuple[int, int] | None]:
    content = json.loads(manifest.read_text())
    if "files" in content:
        return {name: (int(size), int(crc)) for name, (size, crc) in content["files"].items()}
    return dict.fromkeys([_LEADER, *map(_shard_name, range(1, content["workers"]))])


def read_shard(folder: Path, worker: int, weights_only: bool | None = None, mmap: bool = False) -> dict[str, Any]:
    """One worker's shard of a complete checkpoint.

    Args:
        folder: the checkpoint's folder.
        worker: rank of the worker.
        weights_only: whether to unpickle only tensors and plain values; None: True.
        mmap: whether to map the file into memory and read tensors on access. Release its tensors before the file is
            deleted.
    """
    path = folder / _shard_name(worker)
    if not path.exists():
        raise FileNotFoundError(not_seen(str(path)))
    shard: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=weights_only is not False, mmap=mmap)
    return shard


def not_seen(path: str) -> str:
    """The message about a file that one worker sees and another one does not."""
    return (
        f"{path} is not there, though worker 0 finds the checkpoint complete. All workers must see the folder of the "
        "checkpoint: copy `name.ckpt.workers` to this host, or share the folder."
    )


def _problem(path: Path, size: int | None = None, crc32: int | None = None) -> str:
    """The defect of a file; empty if it has this size and checksum, as far as known."""
    if not path.exists():
        return f"{path} is missing"
    found = path.stat().st_size
    if size is not None and found != size:
        return f"{path} has {found} bytes, and {size} were written"
    if size is None and found == 0:
        return f"{path} is empty"
    if crc32 is not None and FileRecord.of(path).crc32 != crc32:
        return f"{path} has changed since it was written"
    return ""


def _found(path: str) -> list[str]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(os.listdir(_folder(path)))
    return []


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # the folder may hold files of others
        folder.rmdir()


def _link(file: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    try:
        os.link(file, link)
    except OSError:  # a file system without links
        shutil.copyfile(file, link)


def _folder(path: str) -> Path:
    return Path(f"{path}.workers")


def _shard_name(worker: int) -> str:
    return f"worker-{worker}.pt"
