"""The files of a job's checkpoints: what is written where, in which order, and what is found again.

A checkpoint is the ordinary Lightning file ``name.ckpt`` with the global model, worker 0's side of the training and,
under ``"async_localsgd"``, the outer state and shared progress (see ``checkpointing.py``). Beside it, in
``name.ckpt.workers/<id>/``::

    leader.ckpt     the Lightning file (name.ckpt is a hard link to it): it outlives an overwritten name.ckpt
    worker-1.pt     inner optimizer, schedulers, loops, callbacks and unpushed progress of worker 1
    ...
    manifest.json   written last: with it the checkpoint is whole

Each file is written aside and renamed. A newer checkpoint of the same name replaces an older one only when it is whole,
so whatever moment a job dies at, the last whole checkpoint is there.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointFiles", "Whole", "find_whole", "link_part", "new_id", "read_part", "write_part"]

_MANIFEST = "manifest.json"
_LEADER = "leader.ckpt"


def new_id() -> str:
    """A name for a checkpoint that no other one has."""
    return uuid.uuid4().hex


def write_part(path: str, checkpoint_id: str, worker: int, part: Mapping[str, Any]) -> None:
    """Write one worker's side of a checkpoint."""
    folder = _folder(path) / checkpoint_id
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"worker-{worker}.tmp"
    buffer = io.BytesIO()  # in one piece to the disk: three times as fast as in torch's many small ones
    torch.save(dict(part), buffer)
    aside.write_bytes(buffer.getbuffer())
    os.replace(aside, _part(folder, worker))


def link_part(path: str, checkpoint_id: str, other_path: str, other_id: str, worker: int) -> None:
    """Make one worker's side of a checkpoint that of another one as well."""
    folder = _folder(other_path) / other_id
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"worker-{worker}.tmp"
    _link(_part(_folder(path) / checkpoint_id, worker), aside)
    os.replace(aside, _part(folder, worker))


def read_part(folder: Path, worker: int, weights_only: bool | None = None) -> dict[str, Any]:
    """One worker's side of a whole checkpoint.

    Args:
        folder: the checkpoint's.
        worker: whose side.
        weights_only: whether to unpickle nothing but tensors and plain values; None: so.

    Raises:
        FileNotFoundError: if this worker cannot see it.
    """
    path = _part(folder, worker)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there, though worker 0 finds the checkpoint whole. All workers must see the folder of the "
            "checkpoint: copy `name.ckpt.workers` to this host, or share the folder."
        )
    part: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=weights_only is not False, mmap=True)
    return part


@dataclass(frozen=True)
class Whole:
    """A checkpoint of which every worker's side is there."""

    path: Path
    """Its Lightning file."""
    folder: Path
    """Where the workers' sides are."""


def find_whole(path: str, checkpoint_id: str | None) -> Whole | None:
    """The checkpoint itself if it is whole; else the newest whole one that it was to replace; else None.

    Without an id it was written by worker 0 alone, and is all that it was to be: None.
    """
    if checkpoint_id is None:
        return None
    path = os.path.realpath(path)  # "last" may be a link
    folder = _folder(path) / checkpoint_id
    if (folder / _MANIFEST).exists():
        return Whole(Path(path), folder)
    older = [m.parent for m in _folder(path).glob(f"*/{_MANIFEST}") if (m.parent / _LEADER).exists()]
    if not older:
        return None
    newest = max(older, key=lambda f: (f / _MANIFEST).stat().st_mtime)
    return Whole(newest / _LEADER, newest)


@dataclass
class _Unfinished:
    path: str
    missing: set[int]


@dataclass
class CheckpointFiles:
    """Worker 0's books: which checkpoints are not whole yet, and which are to go once the newer ones are.

    The training thread and the one that writes in the background (Lightning's ``AsyncCheckpointIO``) share them.

    Args:
        delete: deletes a Lightning file.
        workers: number of workers.
    """

    delete: Callable[[str], None]
    workers: int = 1
    _unfinished: dict[str, _Unfinished] = field(default_factory=dict)
    _to_remove: list[str] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def begin(self, path: str, checkpoint_id: str) -> None:
        """A checkpoint is going to be written. The older one of its name is wanted only until this one is whole."""
        with self._lock:
            if path in self._to_remove:  # its name is used again
                self._to_remove.remove(path)
            self._unfinished[checkpoint_id] = _Unfinished(path, set(range(self.workers)))

    @contextmanager
    def write(self, path: str, checkpoint_id: str) -> Iterator[str]:
        """Where to write worker 0's Lightning file; after the ``with`` it is at ``path``, instead of an older one."""
        folder = _folder(path) / checkpoint_id
        folder.mkdir(parents=True, exist_ok=True)
        yield str(folder / _LEADER)
        aside = folder / "link.tmp"
        _link(folder / _LEADER, aside)
        os.replace(aside, path)
        self.part_written(checkpoint_id, 0)

    def forget(self, path: str) -> None:
        """Worker 0 has written this one alone: sides of an older one of the name do not belong to it."""
        shutil.rmtree(_folder(path), ignore_errors=True)

    def part_written(self, checkpoint_id: str, worker: int) -> None:
        """A worker's side is there; with the last one the checkpoint is whole."""
        with self._lock:
            unfinished = self._unfinished.get(checkpoint_id)
            if unfinished is None:
                return
            unfinished.missing.discard(worker)
            if unfinished.missing:
                return
            del self._unfinished[checkpoint_id]
            folder = _folder(unfinished.path) / checkpoint_id
            aside = folder / "manifest.tmp"
            aside.write_text(json.dumps({"workers": self.workers}))
            os.replace(aside, folder / _MANIFEST)
            for other in _folder(unfinished.path).iterdir():
                if other != folder and other.name not in self._unfinished:
                    shutil.rmtree(other, ignore_errors=True)
            self._remove_what_is_replaced()

    def remove(self, path: str) -> None:
        """Delete a checkpoint, at once or when all newer ones are whole."""
        with self._lock:
            self._to_remove.append(path)
            self._remove_what_is_replaced()

    def _remove_what_is_replaced(self) -> None:
        while self._to_remove and not self._unfinished:
            path = self._to_remove.pop()
            self.delete(path)
            shutil.rmtree(_folder(path), ignore_errors=True)


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except OSError:  # a file system without links
        shutil.copyfile(file, link)


def _folder(path: str) -> Path:
    return Path(f"{path}.workers")


def _part(folder: Path, worker: int) -> Path:
    return folder / f"worker-{worker}.pt"
