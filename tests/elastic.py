"""A Lighthouse and workers that come and go, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def lighthouse(heartbeat_timeout: float = 8.0, port: int = 0) -> Iterator[str]:
    """The address of a Lighthouse that serves in the body.

    A busy machine may keep a process from showing signs of life for seconds.
    """
    from torchft.coordination import LighthouseServer

    server: Any = LighthouseServer(
        f"127.0.0.1:{port}",
        1,
        join_timeout_ms=round(1000 * heartbeat_timeout),
        quorum_tick_ms=50,
        heartbeat_timeout_ms=round(1000 * heartbeat_timeout),
    )
    try:
        yield server.address().rpartition("://")[2]
    finally:
        server.shutdown()
