"""Workers find out whether they agree, at a cost independent of the size of the compared values."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import HashStore, Store

from lightning_async_localsgd.errors import WorkerMismatchError
from lightning_async_localsgd.membership import Roster

TIMEOUT = timedelta(seconds=20)
MODEL = [f"layers.{i}.weight: float32[1024, 1024]" for i in range(2000)]


class CountingStore:
    """A store that counts the bytes of all values that pass."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self.bytes = 0

    def set(self, key: str, value: str) -> None:
        with self._lock:
            self.bytes += len(value)
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value = self._store.get(key)
        with self._lock:
            self.bytes += len(value)
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def introduce(models: list[list[str]]) -> tuple[list[Any], int]:
    """The result of each worker's comparison of these models, and the bytes that went through the store."""
    store = CountingStore(HashStore())

    def one(rank: int) -> Any:
        try:
            return Roster.introduce(store, rank, len(models), {"model": models[rank]}, TIMEOUT)  # type: ignore[arg-type]
        except WorkerMismatchError as error:
            return error

    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(one, range(len(models)))), store.bytes


@pytest.mark.parametrize("size", [2, 8])
def test_workers_that_agree_exchange_no_descriptions(size: int) -> None:
    rosters, traffic = introduce([MODEL] * size)
    assert [roster.rank for roster in rosters] == list(range(size))
    assert traffic < len(json.dumps(MODEL)) / 2


def test_where_one_differs_all_hear_what_differs() -> None:
    odd = [*MODEL[:1000], "layers.1000.weight: float32[7]", *MODEL[1001:]]
    errors, _ = introduce([MODEL, MODEL, odd, MODEL])
    for error in errors:
        assert isinstance(error, WorkerMismatchError)
        assert "Worker 0" in str(error) and "Worker 2" in str(error)
        assert f"`model` is {MODEL[1000]!r} against {odd[1000]!r}" in str(error)
