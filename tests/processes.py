"""Runs a function in several real processes that know each other as torchrun's would."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Collection, MutableSequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.connection import Connection, arbitrary_address, wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from tests import pacing

_context = multiprocessing.get_context("forkserver")
# Children are forked from a process that has imported everything: a start costs milliseconds instead of seconds.
_IMPORTED = [
    "torch.distributed.algorithms.ddp_comm_hooks",  # which Lightning imports as a fit begins
    "lightning_async_localsgd",
    "lightning_async_localsgd.loop",
    "lightning_async_localsgd.simulation",
    "lightning_async_localsgd.trainer.monitor",
    "tests.modules",
]
if find_spec("torchft") is not None:
    os.environ.setdefault("RUST_LOG", "error")  # torchft looks at it once
    _IMPORTED.append("torchft.coordination")
_context.set_forkserver_preload(_IMPORTED)

STILL_RUNNING = "still running after the timeout"


@dataclass
class Outcome:
    """How one process ended."""

    exitcode: int | None
    result: Any = None
    error: str = STILL_RUNNING
    """Type and text of the exception it died of; empty if it returned."""


def run_processes(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = 90,
    store: TCPStore | None = None,
    lost: Collection[int] = (),
) -> list[Outcome]:
    """Call ``function(rank, *args)`` in ``size`` processes; returns how each ended, by rank.

    The store lives in this process, as it does in torchrun's agent, so that the port is never fought over.

    Args:
        function: a module-level function; what it returns must be picklable.
        size: number of processes.
        *args: further arguments of ``function``.
        timeout: seconds after which those that still run are killed; their error then says so.
        store: the one that an earlier attempt of the same job has used, as torchrun keeps it; None: a fresh one.
        lost: ranks that are not waited for, but killed when all others have ended.
    """
    _warm_up()
    store = store or make_store()
    pipes = [_context.Pipe(duplex=False) for _ in range(size)]
    times = _context.RawArray("d", 2 * size)
    processes = [
        _context.Process(target=_main, args=(function, rank, size, store.port, pipes[rank][1], times, args))
        for rank in range(size)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    outcomes = [Outcome(None) for _ in range(size)]
    awaited = {receiver: outcomes[rank] for rank, (receiver, _) in enumerate(pipes) if rank not in lost}
    _collect(awaited, time.monotonic() + timeout)
    for process, outcome in zip(processes, outcomes, strict=True):
        process.join(0 if outcome.error == STILL_RUNNING else 30)
        if process.is_alive():
            process.kill()
            process.join()
        outcome.exitcode = process.exitcode
    return outcomes


def make_store() -> TCPStore:
    """A store in this process."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start_process(function: Callable[..., Any], *args: Any, daemon: bool = True) -> BaseProcess:
    """Start a module-level function in a process that ends with this one, or may start others (``daemon=False``)."""
    _warm_up()
    process = _context.Process(target=function, args=args, daemon=daemon)
    process.start()
    return process


def fork_server() -> None:
    """Have this process forked for the server that others are forked from: it imports nothing a second time.

    To be called before any test, when there are no threads but the one in which pytest-xdist waits for messages.
    """
    server = forkserver._forkserver
    address = arbitrary_address("AF_UNIX")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _forget_pytest(listener.fileno(), receiver)
            forkserver.main(listener.fileno(), receiver, _IMPORTED)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    listener.close()
    os.close(receiver)
    # The fields that `ensure_running` would set, which starts a new interpreter.
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, sender, pid


def _forget_pytest(*kept: int) -> None:
    """Write to the streams of this process, not to pytest's of the one it is forked from, and give up all its files."""
    faulthandler.disable()
    logging.getLogger().handlers.clear()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    files = {int(name) for name in os.listdir("/dev/fd")}
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in files - {0, 1, 2, nothing, *kept}:
        # Not closed: the object that it belongs to may do so, and the number must not be another file's then.
        os.dup2(nothing, file, inheritable=False)


@cache
def _warm_up() -> None:
    """Have the fork server import everything, which takes seconds, before any test's clock runs."""
    process = _context.Process(target=int)
    process.start()
    process.join()


def results(outcomes: list[Outcome]) -> list[Any]:
    """What each process returned; fails if one did not."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.exitcode == 0, f"process {rank} failed: {outcome.error}"
    return [outcome.result for outcome in outcomes]


def _collect(waiting: dict[Connection, Outcome], deadline: float) -> None:
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for receiver in ready:
            outcome = waiting.pop(receiver)  # type: ignore[arg-type]
            try:
                outcome.result, outcome.error = receiver.recv()  # type: ignore[union-attr]
            except EOFError:
                outcome.error = "killed"


def _main(
    function: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    sender: Connection,
    times: MutableSequence[float],
    args: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        TORCHELASTIC_RUN_ID="tests",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    clock = pacing.begin(rank, times)
    try:
        result = function(rank, *args)
    except BaseException as error:
        sender.send((None, "".join(traceback.format_exception_only(error))))
        raise
    finally:
        clock.end()
    sender.send((result, ""))


def job_store(timeout: float = 60) -> Store:
    """The store that the parent hosts, in a child."""
    port = int(os.environ["MASTER_PORT"])
    return PrefixStore("tests", TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout)))
