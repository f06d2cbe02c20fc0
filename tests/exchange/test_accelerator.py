"""Copies are waited for on accelerators of every make: which calls are made, with stand-ins for those of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_async_localsgd.exchange import accelerator

XPU, CPU = torch.device("xpu", 1), torch.device("cpu")


class Event:
    """Records when it was recorded, and whether it was waited for."""

    log: list[tuple[Any, ...]]

    def __init__(self, device: torch.device) -> None:
        self.log.append(("event", device))

    def record(self, stream: Any) -> None:
        self.log.append(("record", stream))

    def synchronize(self) -> None:
        self.log.append(("wait",))


class WithoutStreams(Event):
    def record(self, stream: Any) -> None:
        raise RuntimeError("not implemented")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    log: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Event, "log", log, raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: ("current stream of", device))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: log.append(("wait for all of", device)))
    monkeypatch.setattr(torch, "Event", Event)
    return log


def test_an_event_on_the_current_stream_is_waited_for_where_it_is_asked_for(log: list[tuple[Any, ...]]) -> None:
    wait = accelerator.copied(XPU)
    assert log == [("event", XPU), ("record", ("current stream of", XPU))]
    wait()
    assert log[2:] == [("wait",)]


def test_without_events_the_whole_device_is_waited_for(
    log: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "Event", WithoutStreams)
    accelerator.copied(XPU)()
    assert log[-1] == ("wait for all of", XPU)


def test_on_the_cpu_nothing_is_waited_for(log: list[tuple[Any, ...]]) -> None:
    accelerator.synchronize(CPU)
    assert log == []


def test_host_memory_is_pinned_for_copies_from_and_to_an_accelerator(log: list[tuple[Any, ...]]) -> None:
    assert accelerator.can_pin(XPU, CPU)
    assert not accelerator.can_pin(XPU, XPU)
    assert not accelerator.can_pin(CPU, CPU)
