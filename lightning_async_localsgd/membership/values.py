"""Values in messages between processes: JSON, extended by types that JSON lacks. Nothing is pickled."""

from __future__ import annotations

import base64
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_json", "from_json"]

_TAG = "$type"
_PLAIN = (type(None), bool, int, float, str)


def as_json(value: Any) -> Any:
    """``value`` as plain JSON values; :func:`from_json` restores the types.

    Args:
        value: ``None``, numbers, strings, bytes, lists, tuples, sets and dictionaries of such with any keys, paths,
            times, tensors, NumPy arrays and numbers, ``torch.dtype`` and ``torch.device``. Tensors are restored on the
            CPU, without their autograd history.

    Raises:
        TypeError: if ``value`` is or holds something else; names its type and its place.
    """
    return _as_json(value, "the value")


def from_json(value: Any) -> Any:
    """The value that :func:`as_json` has converted."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: from_json(item) for key, item in value.items()}
    return _READERS[value[_TAG]](value["value"])


def _as_json(value: Any, where: str) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [_as_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if kind is dict and _TAG not in value and all(type(key) is str for key in value):
        return {key: _as_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if kind in _COLLECTIONS:
        items = value.items() if issubclass(kind, dict) else value
        return _tagged(kind.__name__, [_as_json(item, f"an item of {where}") for item in items])
    for name, (types, write) in _WRITERS.items():
        if isinstance(value, types):
            return _tagged(name, write(value))
    raise TypeError(
        f"{where[0].upper()}{where[1:]} is of type {kind.__module__}.{kind.__qualname__}, which cannot be sent to the "
        "other processes: nothing is pickled. Send what it consists of: numbers, strings, lists, tuples, sets, "
        "dictionaries, paths or tensors (of a dataclass, `dataclasses.asdict(...)`)."
    )


def _tagged(name: str, value: Any) -> dict[str, Any]:
    return {_TAG: name, "value": value}


_COLLECTIONS: tuple[type, ...] = (tuple, set, frozenset, deque, dict, OrderedDict)


def _bytes_of(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode()


def _tensor(value: Tensor) -> dict[str, Any]:
    if value.layout != torch.strided or value.is_quantized:
        raise TypeError(f"A tensor of layout {value.layout} cannot be sent: send `tensor.to_dense()`.")
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {"dtype": _name(value.dtype), "shape": list(value.shape), "data": _bytes_of(data)}


def _read_tensor(word: Mapping[str, Any]) -> Tensor:
    data = bytearray(base64.b64decode(word["data"]))
    dtype = getattr(torch, word["dtype"])
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(word["shape"])


def _array(value: np.ndarray[Any, Any] | np.generic) -> dict[str, Any]:
    array = np.asarray(value)
    if array.dtype.hasobject or array.dtype.fields is not None:
        raise TypeError(f"A NumPy array of dtype {array.dtype} cannot be sent: send one of numbers.")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": _bytes_of(array.tobytes())}


def _read_array(word: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    flat: np.ndarray[Any, Any] = np.frombuffer(bytearray(base64.b64decode(word["data"])), np.dtype(word["dtype"]))
    array: np.ndarray[Any, Any] = flat.reshape(word["shape"])
    return array


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_WRITERS: dict[str, tuple[type | tuple[type, ...], Callable[[Any], Any]]] = {
    "bytes": (bytes, _bytes_of),
    "bytearray": (bytearray, _bytes_of),
    "complex": (complex, lambda value: [value.real, value.imag]),
    "path": (PurePath, str),
    "datetime": (datetime, datetime.isoformat),
    "timedelta": (timedelta, lambda value: [value.days, value.seconds, value.microseconds]),
    "tensor": (Tensor, _tensor),
    "number": (np.generic, _array),
    "array": (np.ndarray, _array),
    "dtype": (torch.dtype, _name),
    "device": (torch.device, str),
}
"""By the type's name on the wire: the types written under it, and their conversions. NumPy's complex numbers are NumPy
numbers."""

_READERS: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda items: tuple(map(from_json, items)),
    "set": lambda items: set(map(from_json, items)),
    "frozenset": lambda items: frozenset(map(from_json, items)),
    "deque": lambda items: deque(map(from_json, items)),
    "dict": lambda items: dict(map(from_json, items)),
    "OrderedDict": lambda items: OrderedDict(map(from_json, items)),
    "bytes": base64.b64decode,
    "bytearray": lambda data: bytearray(base64.b64decode(data)),
    "complex": lambda parts: complex(*parts),
    "path": Path,
    "datetime": datetime.fromisoformat,
    "timedelta": lambda parts: timedelta(*parts),
    "tensor": _read_tensor,
    "number": lambda word: _read_array(word)[()],
    "array": _read_array,
    "dtype": lambda name: getattr(torch, name),
    "device": torch.device,
}
