"""Control messages survive the wire; anything else is refused, by the sender and by each receiver."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest

from lightning_async_localsgd.protocol import messages
from lightning_async_localsgd.protocol.messages import (
    Abort,
    CheckpointReplaced,
    CheckpointShardSaved,
    LinkCheckpointShard,
    Message,
    Metrics,
    PlateauMetrics,
    SaveCheckpointShard,
    SaveNamed,
    message_from_json,
)

MESSAGES = [
    Abort("größer"),
    CheckpointReplaced("a.ckpt", "0-1"),
    CheckpointReplaced("a.ckpt", None),
    Metrics({"loss": 1.5, "inf": math.inf, "steps": 3}),
    PlateauMetrics((None, 0.5)),
    SaveNamed("first", 12),
    SaveCheckpointShard("a.ckpt", "0-1"),
    LinkCheckpointShard("b.ckpt", "0-2", "a.ckpt", "0-1"),
    CheckpointShardSaved("0-1", 1 << 40, (1 << 32) - 1),
]


def test_every_kind_is_known_and_has_an_example_here() -> None:
    assert {type(message) for message in MESSAGES} == set(messages._KINDS.values())


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_round_trip(message: Message) -> None:
    assert message_from_json(json.loads(json.dumps(message.to_json()))) == message


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_a_field_that_is_missing_unknown_or_of_another_type_is_refused(message: Message) -> None:
    written = message.to_json()
    for field in fields(message):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{message.kind}.*expected"):
            message_from_json({name: value for name, value in written.items() if name != field.name})
        for wrong in ({"a": {}}, [{}], True):
            with pytest.raises(ValueError, match=f"{message.kind}.*{field.name}"):
                message_from_json(written | {field.name: wrong})
    with pytest.raises(ValueError, match="expected"):
        message_from_json(written | {"more": 1})


@pytest.mark.parametrize("value", [None, [], "abort", {}, {"kind": "other"}, {"kind": ["abort"]}, {"kind": None}])
def test_what_is_of_no_known_kind_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"not a JSON object|unknown kind"):
        message_from_json(value)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (CheckpointShardSaved, ("0-1", -1, 0)),
        (CheckpointShardSaved, ("0-1", 1, 1 << 32)),
        (CheckpointShardSaved, ("0-1", 1.0, 0)),
        (SaveNamed, ("first", 1 << 60)),
        (Metrics, ({"loss": None},)),
        (Metrics, ({"loss": 10**400},)),
        (PlateauMetrics, (("1",),)),
    ],
)
def test_a_field_outside_its_range_is_not_sent(kind: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="its message of kind"):
        kind(*arguments)
