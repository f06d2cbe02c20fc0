"""Writes checkpoint files directly from tensors, with a checksum."""

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

_BUFFER = 1 << 23  # bytes: joins torch's many small writes, which are slow
_BLOCK = 1 << 22  # bytes read at once


class FileRecord(NamedTuple):
    """Size and checksum of a file."""

    size: int
    """Size in bytes."""
    crc32: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The record of an existing file, which is read."""
        size = crc = 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return cls(size, crc)


class _Recorded(io.RawIOBase):
    """Passes writes on to a file, and computes their size and checksum."""

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
    """Write an object with ``torch.save`` under a temporary name and rename the file, without copying CPU tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    with open(aside, "wb", buffering=0) as file:
        recorded = _Recorded(file)
        with io.BufferedWriter(recorded, _BUFFER) as buffered:
            torch.save(content, buffered)
    os.replace(aside, path)
    return recorded.record


def make_durable(path: Path) -> None:
    """Flush a file or folder, and its name, to the disk, so that it survives a power failure."""
    for place in (path, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:  # some network file systems do not support this for folders
            if place is path and path.is_file():
                raise
        finally:
            os.close(descriptor)


class StreamingCheckpointIO(TorchCheckpointIO):
    """Lightning's default plugin, without its two copies of the whole file in memory."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_file(checkpoint, Path(path))


def save_with(checkpoint_io: Any, checkpoint: dict[str, Any], path: Path) -> FileRecord:
    """Write a file with a plugin. Returns its size and checksum."""
    if type(checkpoint_io) in (TorchCheckpointIO, StreamingCheckpointIO):
        return write_file(checkpoint, path)
    checkpoint_io.save_checkpoint(checkpoint, str(path))
    return FileRecord.of(path)


class BackgroundWriter:
    """Calls functions one after the other on a thread of its own. The next method call raises their errors."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: list[Future[Any]] = []
        self._lock = threading.RLock()  # the thread of Lightning's `AsyncCheckpointIO` submits as well

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function`` after all functions submitted before."""
        with self._lock:
            self.check()
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "async-localsgd-checkpoints")
            self._under_way.append(self._thread.submit(function, *args))

    def check(self) -> None:
        """Raise the error of a failed function."""
        with self._lock:
            while self._under_way and self._under_way[0].done():
                self._under_way.pop(0).result()

    def wait(self) -> None:
        """Wait until all functions have returned, and end the thread. Raises the error of a failed function."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self.check()
