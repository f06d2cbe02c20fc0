"""Headers survive the wire; anything else is refused."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import pytest

from lightning_async_localsgd.protocol.header import HEADER_BYTES, MESSAGE_BYTES, Flag, Header
from lightning_async_localsgd.protocol.messages import Abort

HEADER = Header(
    worker=3,
    turn=2**40,
    version=7,
    checksum=-(2**62),
    flags=Flag.DELTA | Flag.FINAL,
    steps=123,
    speed=4.5,
    round=9,
    round_steps=50,
    round_samples=1600,
    round_seconds=12.25,
    shard=2,
    start_version=5,
    message=Abort("größer"),
)


def test_round_trip() -> None:
    data, text = HEADER.pack()
    assert (len(data), len(text)) == (HEADER_BYTES, Header.message_bytes(data))
    assert Header.unpack(data, text) == HEADER
    assert Header(worker=0, turn=0).pack()[1] == b""
    assert Header.unpack(*Header(worker=0, turn=0).pack()) == Header(worker=0, turn=0)


def test_a_thousand_headers_stay_small() -> None:
    assert 1024 * HEADER_BYTES < 1 << 18


def test_a_message_that_does_not_fit_is_refused() -> None:
    room = MESSAGE_BYTES - len('{"kind": "abort", "reason": ""}')
    Header(worker=0, turn=0, message=Abort("x" * room)).pack()
    with pytest.raises(ValueError, match="too long"):
        Header(worker=0, turn=0, message=Abort("x" * (room + 1))).pack()


DATA, TEXT = HEADER.pack()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", b""),
        (bytes(HEADER_BYTES), b""),
        (b"HTTP" + DATA[4:], TEXT),
        (DATA[:4] + b"\xff\xff" + DATA[6:], TEXT),  # another protocol
        (DATA[:8] + b"\xff\xff\xff\xff" + DATA[12:], TEXT),  # a message that is too long
        (DATA, TEXT[:-1]),
        (DATA, TEXT.replace(b'{"kind"', b'["kind"')),
        (DATA, TEXT.replace(b'"abort"', b'"other"')),
        (Header(worker=0, turn=0, message=Abort("")).pack()[0], b"1" * 31),
    ],
)
def test_malformed_headers_are_refused(data: bytes, text: bytes) -> None:
    with pytest.raises(ValueError, match=r"header|message|range|Expecting"):
        Header.unpack(data, text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("speed", math.inf),
        ("speed", -math.inf),
        ("speed", math.nan),
        ("speed", -1.0),
        ("speed", 1e300),
        ("round_seconds", -1.0),
        ("round_seconds", math.inf),
        ("steps", -1),
        ("turn", 1 << 60),
        ("round_samples", 1 << 63),
        ("start_version", 8),  # past the version of now: its staleness would be negative
    ],
)
def test_a_field_outside_its_range_is_neither_sent_nor_taken(
    field: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = replace(HEADER, **{field: value})
    with pytest.raises(ValueError, match=field):
        header.pack()
    with monkeypatch.context() as patch:
        patch.setattr(Header, "_check", lambda self: None)
        try:
            data = header.pack()
        except (OverflowError, struct.error):
            return  # it has no place on the wire at all
    with pytest.raises(ValueError, match=field):
        Header.unpack(*data)


def test_unknown_flags_are_refused() -> None:
    with pytest.raises(ValueError, match="flags"):
        Header.unpack(DATA[:6] + b"\xff\xff" + DATA[8:], TEXT)


def test_a_message_that_is_nested_without_end_is_refused() -> None:
    text = b"[" * MESSAGE_BYTES
    data, _ = Header(worker=0, turn=0).pack()
    with pytest.raises(ValueError, match="message"):
        Header.unpack(data[:8] + len(text).to_bytes(4, "little") + data[12:], text)
