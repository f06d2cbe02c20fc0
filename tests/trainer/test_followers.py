"""Validation metrics on workers other than worker 0."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightning_async_localsgd.protocol.header import encode_message
from lightning_async_localsgd.trainer.followers import FollowedMetrics, metric_messages


def test_metrics_go_in_as_few_messages_as_hold_them() -> None:
    metrics = {f"{i}/{'a long name' * 20}": i / 3 for i in range(20)} | {"naïve": math.inf}
    messages = list(metric_messages(metrics))
    assert {name: value for message in messages for name, value in message.values.items()} == metrics
    assert 1 < len(messages) < 5
    for message in messages:
        encode_message(message)  # refuses one that is too long
    assert list(metric_messages({})) == []


def test_a_name_that_no_message_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter name"):
        list(metric_messages({"loss": 1.0, "x" * 5000: 2.0}))


def test_a_metric_that_is_not_known_yet_is_nan() -> None:
    metrics = FollowedMetrics(loss=torch.tensor(1.0))
    with pytest.warns(UserWarning, match="worker 0 validates for all"):
        assert metrics["val_loss"].isnan()
    assert "val_loss" not in metrics and metrics.get("val_loss") is None
    assert copy.deepcopy(metrics)["loss"] == 1.0
