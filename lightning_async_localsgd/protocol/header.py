"""The header of a turn: a worker's counts in a fixed number of bytes, and its control message, if it sends one."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from enum import IntFlag

from lightning_async_localsgd.protocol.messages import Message, message_from_json

__all__ = ["HEADER_BYTES", "MESSAGE_BYTES", "PROTOCOL", "Flag", "Header", "encode_message"]

PROTOCOL = 8
_MAGIC = b"ALSG"
_PREFIX = struct.Struct("<4sHHI")  # magic, protocol, flags, bytes of message
_FIELDS = struct.Struct("<12Qdddq")
HEADER_BYTES = _PREFIX.size + _FIELDS.size
MESSAGE_BYTES = 4096
_COUNTS = (
    "worker",
    "turn",
    "version",
    "steps",
    "reserved",
    "round",
    "round_steps",
    "round_samples",
    "shard",
    "fragment",
    "start_version",
)
_LARGEST_COUNT = 1 << 53  # exact as a float too
_LARGEST_SPEED = 1e9  # local steps per second; the speeds of all workers add up to something finite


class Flag(IntFlag):
    """What a worker says of itself in a header."""

    NONE = 0
    DELTA = 1  # it has a delta, to be applied in this turn or, while the quorum is not met, in a later one
    DROPPED = 2  # its delta was not finite: its steps count, the delta is not sent
    IDLE = 4  # it waits at its share of the budget; it pushes what it has when that grows, or at the end
    FINAL = 8  # it has made its last step and has nothing to push or to say after this
    STOP = 16  # it asks all workers to end their training
    PAUSED = 32  # it is busy with something other than training: validation, a checkpoint
    ABORT = 64  # it leaves because of an error, which the message tells


_ALL_FLAGS = sum(Flag)


@dataclass(frozen=True)
class Header:
    """One worker's side of one turn. All counts are of this run.

    ``round``, ``round_steps``, ``round_samples``, ``round_seconds``, ``shard``, ``fragment`` and its ``start_version``
    are about the delta, if there is one; ``steps`` and ``speed`` (local steps per second) are as of now. ``reserved``
    is how many further steps the worker may make before it learns of this turn's outcome, and keeps in any case.
    ``exchange_seconds`` is how long a turn with a delta of this worker's takes from its headers to its end,
    ``exchange_cost`` for how much of that its exchange thread keeps a processor busy; both 0 while unknown.
    ``checksum`` is that of the global state at ``version``, before this turn.
    """

    worker: int
    turn: int
    version: int = 0
    checksum: int = 0
    flags: Flag = Flag.NONE
    steps: int = 0
    reserved: int = 0
    speed: float = 0.0
    exchange_seconds: float = 0.0
    exchange_cost: float = 0.0
    round: int = 0
    round_steps: int = 0
    round_samples: int = 0
    round_seconds: float = 0.0
    shard: int = 0
    fragment: int = 0
    start_version: int = 0
    message: Message | None = None

    def pack(self) -> tuple[bytes, bytes]:
        """The header as ``HEADER_BYTES`` bytes, and its message as at most ``MESSAGE_BYTES``; empty if there is none.

        Raises:
            ValueError: if a field is outside its range, or the message, as JSON, is longer than ``MESSAGE_BYTES``.
        """
        self._check()
        text = b"" if self.message is None else encode_message(self.message)
        prefix = _PREFIX.pack(_MAGIC, PROTOCOL, self.flags, len(text))
        fields = _FIELDS.pack(
            self.worker,
            self.turn,
            self.version,
            self.steps,
            self.reserved,
            self.round,
            self.round_steps,
            self.round_samples,
            round(self.round_seconds * 1e6),
            self.shard,
            self.fragment,
            self.start_version,
            self.speed,
            self.exchange_seconds,
            self.exchange_cost,
            self.checksum,
        )
        return prefix + fields, text

    @staticmethod
    def message_bytes(data: bytes) -> int:
        """The length of the message that belongs to a packed header.

        Raises:
            ValueError: if ``data`` is not a header of this protocol, or its message is too long.
        """
        if len(data) != HEADER_BYTES:
            raise ValueError(f"a header has {HEADER_BYTES} bytes, got {len(data)}")
        magic, protocol, _, length = _PREFIX.unpack_from(data)
        if magic != _MAGIC or protocol != PROTOCOL:
            raise ValueError(f"not a header of protocol {PROTOCOL}")
        if length > MESSAGE_BYTES:
            raise ValueError(f"its message claims {length} bytes of at most {MESSAGE_BYTES}")
        return int(length)

    @classmethod
    def unpack(cls, data: bytes, text: bytes = b"") -> Header:
        """Read a header.

        Args:
            data: the header, ``HEADER_BYTES`` long.
            text: its message, as many bytes as :meth:`message_bytes` tells.

        Raises:
            ValueError: if ``data`` is not a header of this protocol, a field is outside its range, or ``text`` is not
                its message.
        """
        if len(text) != cls.message_bytes(data):
            raise ValueError(f"its message has {len(text)} bytes instead of {cls.message_bytes(data)}")
        _, _, flags, _ = _PREFIX.unpack_from(data)
        values = _FIELDS.unpack_from(data, _PREFIX.size)
        header = cls(
            worker=values[0],
            turn=values[1],
            version=values[2],
            steps=values[3],
            reserved=values[4],
            round=values[5],
            round_steps=values[6],
            round_samples=values[7],
            round_seconds=values[8] / 1e6,
            shard=values[9],
            fragment=values[10],
            start_version=values[11],
            speed=values[12],
            exchange_seconds=values[13],
            exchange_cost=values[14],
            checksum=values[15],
            flags=Flag(flags),
            message=_message(text) if text else None,
        )
        header._check()
        return header

    def _check(self) -> None:
        for name in _COUNTS:
            _check_range(name, getattr(self, name), _LARGEST_COUNT)
        _check_range("speed", self.speed, _LARGEST_SPEED)
        for name in ("round_seconds", "exchange_seconds", "exchange_cost"):
            _check_range(name, getattr(self, name), _LARGEST_COUNT / 1e6)
        if self.start_version > self.version:
            raise ValueError(f"its `start_version` is {self.start_version}, past its `version`, {self.version}")
        if int(self.flags) & ~_ALL_FLAGS:
            raise ValueError(f"its flags, {int(self.flags)}, are not all known")


def encode_message(message: Message) -> bytes:
    """A message as JSON.

    Raises:
        ValueError: if that is longer than ``MESSAGE_BYTES``.
    """
    text = json.dumps(message.to_json(), ensure_ascii=False).encode()
    if len(text) > MESSAGE_BYTES:
        raise ValueError(f"A control message of {len(text)} bytes is too long: at most {MESSAGE_BYTES} fit.")
    return text


def _check_range(name: str, value: float, largest: float) -> None:
    if not (math.isfinite(value) and 0 <= value <= largest):
        raise ValueError(f"its `{name}` is {value}, outside 0 to {largest:g}")


def _message(text: bytes) -> Message:
    try:
        return message_from_json(json.loads(text))  # a JSONDecodeError is a ValueError
    except RecursionError as error:
        raise ValueError("its message is nested too deeply") from error
