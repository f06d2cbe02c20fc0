"""Writes files of checkpoints straight from the tensors, and knows afterwards whether they are as they were written."""

from __future__ import annotations

import io
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

__all__ = ["BackgroundWriter", "FileRecord", "StreamingCheckpointIO", "make_durable", "save_with", "write_file"]

_BUFFER = 1 << 23  # bytes: torch writes many small pieces, which cost more than what is in them
_BLOCK = 1 << 22  # bytes read at once


class FileRecord(NamedTuple):
    """What tells whether a file is whole."""

    size: int
    """Bytes."""
    crc32: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """That of a file, which is read."""
        size = crc = 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return cls(size, crc)


class _Recorded(io.RawIOBase):
    """Passes on to a file what is written, and keeps its size and checksum."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__()
        self._file = file
        self.record = FileRecord(0, 0)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        written = self._file.write(data)
        size, crc = self.record
        self.record = FileRecord(size + written, zlib.crc32(memoryview(data)[:written], crc))
        return written


def write_file(content: Any, path: Path) -> FileRecord:
    """Write an object aside with ``torch.save`` and rename the file; no copy is made of tensors on the CPU."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    with open(aside, "wb", buffering=0) as file:
        recorded = _Recorded(file)
        with io.BufferedWriter(recorded, _BUFFER) as buffered:
            torch.save(content, buffered)
    os.replace(aside, path)
    return recorded.record


def make_durable(path: Path) -> None:
    """Have a file or folder, and its name, outlive a power failure."""
    for place in (path, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:  # some network file systems have no such call for folders
            if place is path and path.is_file():
                raise
        finally:
            os.close(descriptor)


class StreamingCheckpointIO(TorchCheckpointIO):
    """Lightning's way to write a checkpoint, without its two copies of the whole file in memory."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_file(checkpoint, Path(path))


def save_with(checkpoint_io: Any, checkpoint: dict[str, Any], path: Path) -> FileRecord:
    """Have a plugin write a file."""
    if type(checkpoint_io) in (TorchCheckpointIO, StreamingCheckpointIO):
        return write_file(checkpoint, path)
    checkpoint_io.save_checkpoint(checkpoint, str(path))
    return FileRecord.of(path)


class BackgroundWriter:
    """Does one thing after the other on a thread of its own. What fails there is raised by the next call."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: list[Future[Any]] = []
        self._lock = threading.RLock()  # Lightning's `AsyncCheckpointIO` has a thread of its own, which submits too

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Have it called after all that was submitted before."""
        with self._lock:
            self.check()
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "async-localsgd-checkpoints")
            self._under_way.append(self._thread.submit(function, *args))

    def check(self) -> None:
        """Raise what has failed."""
        with self._lock:
            while self._under_way and self._under_way[0].done():
                self._under_way.pop(0).result()

    def wait(self) -> None:
        """Wait until all is done, and end the thread; raise what has failed."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self.check()
