"""Commands ``python`` and ``torchrun`` for tests of command lines: their interpreters have imported Lightning already.

One command line starts up to five interpreters, and each of them imports torch and Lightning, which takes longer than
its run. These commands ask a server, a fork of the fork server of ``tests.processes``, for a process that has imported
both. The process has the arguments, environment, working folder, streams and namespaces of the command, and the command
ends as the process does. ``sys.executable`` is the command there: launchers start the others by it.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tests.hosts import join
from tests.processes import start_process

_ASK = Path(__file__).with_name("ask.py")


@cache
def folder() -> Path:
    """The folder of the commands, for the front of ``PATH``; they work until this process ends."""
    place = Path(mkdtemp(prefix="commands-"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place / "server"))
    listener.listen(64)
    _executable(place / "python", [sys.executable, "-IS", str(_ASK), sys.executable, str(place)])
    _executable(place / "torchrun", [str(place / "python"), "-m", "torch.distributed.run"])
    start_process(_serve, listener, place)
    listener.close()
    return place


def _executable(path: Path, command: list[str]) -> None:
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o755)


def run_main(script: str | None, module: str | None = None) -> int:
    """Run a script or a module as ``python`` would in a process that ends then; returns the exit code."""
    try:
        if module is not None:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            assert script is not None
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    return 0


def _serve(listener: socket.socket, place: Path) -> None:
    """Run commands until the process that has started this one ends, in whatever way."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the handlers are not waited for
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    parent = multiprocessing.parent_process()
    assert parent is not None
    try:
        while parent.sentinel not in wait([listener, parent.sentinel]):
            connection, _ = listener.accept()
            if os.fork() == 0:
                try:
                    listener.close()
                    _handle(connection)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            connection.close()
    finally:
        shutil.rmtree(place)


def _handle(connection: socket.socket) -> None:
    """Run one command in a child: signals come from the connection, and the child's end goes there."""
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile("rb", buffering=0).readline())
    child = os.fork()
    if child == 0:
        os.close(connection.detach())
        os._exit(_run(request, streams))
    for stream in streams:
        os.close(stream)
    with suppress(OSError):  # the child does so, too
        os.setpgid(child, child)
    threading.Thread(target=_pass_signals_on, args=(connection, child), daemon=True).start()
    _, status = os.waitpid(child, 0)
    with suppress(BrokenPipeError):  # the command was killed
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _pass_signals_on(connection: socket.socket, child: int) -> None:
    with suppress(ProcessLookupError):
        while number := connection.recv(1):
            os.kill(child, number[0])
        os.kill(child, 0)  # it has not ended: the command was killed
        os.killpg(child, signal.SIGKILL)


def _run(request: dict[str, Any], streams: list[int]) -> int:
    os.setpgid(0, 0)
    join(request["pid"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    process = multiprocessing.current_process()
    process.name, process.daemon = "MainProcess", False
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.executable = request["executable"]
    sys.argv = request["arguments"]
    if sys.argv[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        del sys.argv[0]
    if sys.argv[0] == "-m":
        module, sys.argv = sys.argv[1], sys.argv[1:]
        sys.path.insert(0, os.getcwd())
        return run_main(None, module)
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    return run_main(sys.argv[0])
