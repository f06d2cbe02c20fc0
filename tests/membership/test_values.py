"""Messages keep the types of what they hold, and refuse by name what they cannot hold."""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_async_localsgd.membership import as_json, from_json
from tests.processes import results, run_processes

PLAIN = [
    None,
    True,
    2**70,
    0.1,
    float("-inf"),
    "ü",
    b"\x00\xff",
    bytearray(b"ab"),
    1 + 2j,
    Path("a") / "b",
    (1, (2.0, [3])),
    {3},
    frozenset({(1, 2)}),
    deque([1, 2]),
    {"a": {"b": (1,)}},
    {0: "cat", (1, 2): None, None: 1.5},
    {"$type": "tuple", "value": [1]},
    OrderedDict([(2, "b"), (1, "a")]),
    datetime(2024, 1, 2, 3, 4, 5, 6),
    timedelta(days=1, microseconds=3),
    np.float32(0.1),
    np.float64(0.1),
    np.int64(-3),
    torch.bfloat16,
    torch.device("cpu"),
]
TENSORS = [
    torch.tensor(3.5),
    torch.arange(6).view(2, 3).T,
    torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
    torch.zeros(0, 4),
    torch.tensor([True, False]),
    torch.tensor([1 + 2j]),
]
ARRAYS = [np.arange(6, dtype=np.int16).reshape(2, 3), np.array([]), np.array(["a", "bc"])]


def over_the_wire(value: Any) -> Any:
    return from_json(json.loads(json.dumps(as_json(value))))


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_values_come_back_with_their_types(value: Any) -> None:
    back = over_the_wire(value)
    assert type(back) is type(value) and back == value and repr(back) == repr(value)


@pytest.mark.parametrize("value", TENSORS, ids=lambda t: f"{t.dtype}{list(t.shape)}")
def test_tensors_come_back_bit_for_bit(value: torch.Tensor) -> None:
    back = over_the_wire([value])[0]
    assert back.dtype == value.dtype and back.shape == value.shape
    torch.testing.assert_close(back, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays_come_back(value: Any) -> None:
    back = over_the_wire(value)
    assert back.dtype == value.dtype and back.shape == value.shape and (back == value).all()
    back[...] = back  # it can be written to


@dataclass
class Point:
    x: int


@pytest.mark.parametrize("value", [Point(1), object(), lambda: 1, torch.zeros(2).to_sparse(), np.array([object()])])
def test_other_types_are_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError) as error:
        as_json({"points": [0, value]})
    assert "cannot be sen" in str(error.value)
    if isinstance(value, Point):
        assert "The value['points'][1] is of type tests.membership.test_values.Point" in str(error.value)


def broadcasting(rank: int) -> Any:
    from lightning_async_localsgd.membership import join_job

    job = join_job(rank, 2, timedelta(seconds=30))
    job.next_stage()
    error = ""
    try:
        job.broadcast(Point(1) if rank == 0 else None)
    except TypeError as refusal:
        error = str(refusal)
    return job.broadcast((1, {0: Path("x")}) if rank == 1 else None, root=1), error


def test_a_value_that_cannot_be_sent_is_refused_on_every_process() -> None:
    for value, error in results(run_processes(broadcasting, 2)):
        assert value == (1, {0: Path("x")})
        assert "Point" in error
