"""Worker processes: started as by a launcher, supervised, and always ended."""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

Config = TypeVar("Config")
Result = TypeVar("Result")

_SPAWN = multiprocessing.get_context("spawn")
_LAST_LINES = 40
_EXIT_SECONDS = 20.0


class WorkerFailedError(RuntimeError):
    """A worker did not deliver its result."""


def run_workers(
    target: Callable[[int, Config], Result], config: Config, workers: int, timeout: float = 600.0
) -> list[Result]:
    """Run ``target(rank, config)`` in one process per worker; returns the results by rank.

    Every process finds the environment that torchrun gives, and computes on one thread.

    Args:
        target: A function of a module's top level.
        config: Argument of all workers; pickled.
        workers: Number of processes.
        timeout: Seconds after which unfinished workers are taken to hang.

    Raises:
        WorkerFailedError: If a worker fails or hangs; with the last output of the workers.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a new process imports torch
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"worker-{rank}.log") for rank in range(workers)]
        processes = []
        connections = []
        try:
            for rank, log in enumerate(logs):
                receiver, sender = _SPAWN.Pipe(duplex=False)
                arguments = (target, config, rank, workers, port, log, sender)
                process = _SPAWN.Process(target=_work, args=arguments, name=f"worker {rank}")
                process.start()
                sender.close()  # the worker holds the only other end: if it dies, reading here says so
                processes.append(process)
                connections.append(receiver)
            results = _collect(connections, logs, timeout)
            for process in processes:
                process.join(_EXIT_SECONDS)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _collect(connections: Sequence[Connection], logs: Sequence[Path], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        waiting = [rank for rank in range(len(connections)) if rank not in results]
        ready = wait([connections[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorkerFailedError(_describe(f"still runs after {timeout:g} s", waiting, logs))
        for rank in waiting:
            if connections[rank] not in ready:
                continue
            try:
                results[rank] = connections[rank].recv()
            except EOFError:
                raise WorkerFailedError(_describe("failed", [rank], logs)) from None
    return [results[rank] for rank in range(len(connections))]


def _describe(problem: str, ranks: Sequence[int], logs: Sequence[Path]) -> str:
    texts = []
    for rank in ranks:
        lines = logs[rank].read_text(errors="replace").splitlines() if logs[rank].exists() else []
        texts += [f"Worker {rank} {problem}. It printed last:", *(f"    {line}" for line in lines[-_LAST_LINES:])]
    return "\n".join(texts)


def _work(
    target: Callable[[int, Config], Result],
    config: Config,
    rank: int,
    workers: int,
    port: int,
    log: Path,
    sender: Connection,
) -> None:
    """Main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(workers),
        LOCAL_WORLD_SIZE=str(workers),
    )
    torch.set_num_threads(1)
    try:
        sender.send(target(rank, config))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # At once: a library's threads, left in the middle of things, could keep the process from ending.
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
