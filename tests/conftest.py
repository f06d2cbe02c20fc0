"""Forks the server of the tests' processes when their modules have been imported, and before any test."""

from __future__ import annotations

import sys

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if session.items and "tests.processes" in sys.modules:
        sys.modules["tests.processes"].fork_server()
