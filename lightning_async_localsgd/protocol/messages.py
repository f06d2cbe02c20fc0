"""Control messages: what workers tell each other beside the counts of a header, one message on each.

On the wire a message is a JSON object: its kind, and its fields by name. ``header.py`` bounds its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

__all__ = [
    "Abort",
    "CheckpointReplaced",
    "CheckpointShardSaved",
    "Cut",
    "LinkCheckpointShard",
    "Message",
    "Metrics",
    "PlateauMetrics",
    "SaveCheckpointShard",
    "SaveNamed",
    "message_from_json",
]

_LARGEST_COUNT = 1 << 53


class Message:
    """Base of all messages. A message checks its fields when it is made, by the sender and by each receiver.

    Raises:
        ValueError: if a field is of another type, or outside its range.
    """

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The message as a JSON object; :func:`message_from_json` reads it."""
        return {"kind": self.kind, **vars(self)}

    def _require(self, fits: bool, field: str) -> None:
        if not fits:
            raise ValueError(f"its message of kind {self.kind!r} has the {field} {getattr(self, field)!r}")

    def _require_texts(self, *names: str) -> None:
        for name in names:
            self._require(isinstance(getattr(self, name), str), name)

    def _require_count(self, name: str, largest: int = _LARGEST_COUNT) -> None:
        value = getattr(self, name)
        self._require(type(value) is int and 0 <= value <= largest, name)


class Cut(Message):
    """A message that has all workers stop the exchange after its turn, and do something there."""


@dataclass(frozen=True)
class Abort(Message):
    """The sender leaves because of an error. The header has the flag ``ABORT``."""

    kind = "abort"
    reason: str

    def __post_init__(self) -> None:
        self._require_texts("reason")


@dataclass(frozen=True)
class Metrics(Message):
    """What worker 0 has validated, by name."""

    kind = "metrics"
    values: Mapping[str, float]

    def __post_init__(self) -> None:
        self._require(
            isinstance(self.values, Mapping)
            and all(isinstance(name, str) and _is_number(value) for name, value in self.values.items()),
            "values",
        )


@dataclass(frozen=True)
class PlateauMetrics(Message):
    """What worker 0 steps its schedulers of kind ``ReduceLROnPlateau`` with, in their order; None: not this one."""

    kind = "plateau_metrics"
    values: tuple[float | None, ...]

    def __post_init__(self) -> None:
        known = isinstance(self.values, tuple) and all(value is None or _is_number(value) for value in self.values)
        self._require(known, "values")


@dataclass(frozen=True)
class SaveCheckpointShard(Cut):
    """Each worker is to save its shard of a checkpoint that worker 0 writes."""

    kind = "save_checkpoint_shard"
    path: str
    checkpoint_id: str

    def __post_init__(self) -> None:
        self._require_texts("path", "checkpoint_id")


@dataclass(frozen=True)
class LinkCheckpointShard(Message):
    """Each worker's shard of one checkpoint is also its shard of another one, of the same cut."""

    kind = "link_checkpoint_shard"
    path: str
    checkpoint_id: str
    saved_path: str
    """Where the first one is."""
    saved_id: str

    def __post_init__(self) -> None:
        self._require_texts("path", "checkpoint_id", "saved_path", "saved_id")


@dataclass(frozen=True)
class CheckpointShardSaved(Message):
    """The sender has written its shard of a checkpoint, as a file of this size and checksum."""

    kind = "checkpoint_shard_saved"
    checkpoint_id: str
    size: int
    """Bytes."""
    crc32: int

    def __post_init__(self) -> None:
        self._require_texts("checkpoint_id")
        self._require_count("size")
        self._require_count("crc32", (1 << 32) - 1)


@dataclass(frozen=True)
class CheckpointReplaced(Message):
    """A checkpoint is complete: older shards under its path can go; without an id all shards under it can go."""

    kind = "checkpoint_replaced"
    path: str
    checkpoint_id: str | None

    def __post_init__(self) -> None:
        self._require_texts("path")
        if self.checkpoint_id is not None:
            self._require_texts("checkpoint_id")


@dataclass(frozen=True)
class SaveNamed(Cut):
    """Each worker of a plain loop is to call its ``on_checkpoint`` with this name."""

    kind = "save_named"
    name: str
    job_steps: int

    def __post_init__(self) -> None:
        self._require_texts("name")
        self._require_count("job_steps")


_KINDS: dict[str, type[Any]] = {
    message.kind: message
    for message in (
        Abort,
        CheckpointReplaced,
        Metrics,
        PlateauMetrics,
        SaveNamed,
        SaveCheckpointShard,
        LinkCheckpointShard,
        CheckpointShardSaved,
    )
}


def message_from_json(value: object) -> Message:
    """The message that :meth:`Message.to_json` has written.

    Raises:
        ValueError: if ``value`` is none, its kind is unknown, or a field is missing, unknown or outside its range.
    """
    if not isinstance(value, dict):
        raise ValueError("its message is not a JSON object")
    given = {name: tuple(part) if isinstance(part, list) else part for name, part in value.items()}
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"its message is of an unknown kind, {kind!r}")
    names = {field.name for field in fields(_KINDS[kind])}
    if given.keys() != names:
        raise ValueError(f"its message of kind {kind!r} has the fields {sorted(given)}, expected {sorted(names)}")
    message: Message = _KINDS[kind](**given)
    return message


def _is_number(value: object) -> bool:
    """Whether ``value`` is a number that fits into a float; infinities and NaN do."""
    return type(value) is float or (type(value) is int and abs(value) <= _LARGEST_COUNT)
