"""Runs a script as ``python script.py`` would, but in a process that has torch and Lightning imported already.

For tests of what a script does, not of how it is started: to import both takes longer than most of them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tests.processes import start_process


class Started:
    """A script that runs.

    Args:
        script: its path; its folder becomes the working directory.
        environment: all of its environment.
        arguments: those of the command line.
        enter: called before it begins; None: it runs where the tests do.
    """

    def __init__(
        self,
        script: Path,
        environment: Mapping[str, str],
        arguments: Sequence[str] = (),
        enter: Callable[[], None] | None = None,
    ) -> None:
        self._output = script.with_name(f"{script.stem}-{time.monotonic_ns()}.log")
        options = dict(environment), list(arguments), enter, self._output
        self._process: BaseProcess = start_process(_run, script, *options, daemon=False)

    @property
    def output(self) -> str:
        """What it, and all that it has started, has printed so far."""
        return self._output.read_text() if self._output.exists() else ""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to it alone."""
        os.kill(self._pid, number)

    def end(self, timeout: float) -> tuple[int | None, str]:
        """Wait for it; returns its exit code and output. If it outlives the time, it is killed with what it started."""
        self._process.join(timeout)
        if self.running:
            with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(self._pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
        return self._process.exitcode, self.output

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid


def ends(started: Sequence[Started], timeout: float = 150) -> list[tuple[int | None, str]]:
    """Wait for all; returns exit code and output of each. Those that outlive the time are killed."""
    deadline = time.monotonic() + timeout
    return [script.end(max(0.0, deadline - time.monotonic())) for script in started]


def _run(
    script: Path, environment: dict[str, str], arguments: list[str], enter: Callable[[], None] | None, output: Path
) -> None:
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(script.parent)
    os.environ.clear()
    os.environ.update(environment)
    if enter is not None:
        enter()
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which processes of `multiprocessing` leave out
