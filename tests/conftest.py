"""The order of the tests, and the server of their processes."""

from __future__ import annotations

import os
import sys

import pytest

# Libtorch's store looks up the name of whoever connects, and answers nobody meanwhile: where queries get lost, for the
# five seconds after which the system asks again. In one second, tests with short timeouts bear it.
os.environ.setdefault("RES_OPTIONS", "timeout:1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring tests of imports together: every process of pytest that runs one starts a server, which takes seconds."""
    items.sort(key=lambda item: not _imports_anew(item))


def _imports_anew(item: pytest.Item) -> bool:
    assert isinstance(item, pytest.Function)
    names = item.function.__code__.co_names
    used = [item.function.__globals__.get(name) for name in names]
    return "tests.imports" in [getattr(value, "__module__", getattr(value, "__name__", None)) for value in used]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Fork the server when all modules of tests have been imported, and before any test."""
    if session.items and "tests.processes" in sys.modules:
        capture = session.config.pluginmanager.getplugin("capturemanager")
        capture.resume_global_capture()  # as in a test, whose output that of its processes is
        sys.modules["tests.processes"].fork_server()
        capture.suspend_global_capture()
