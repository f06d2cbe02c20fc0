"""``async-localsgd lighthouse``: the server by which workers that come and go find each other."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from typing import Any

from lightning_async_localsgd.cli.usage import HelpFormatter, UsageError
from lightning_async_localsgd.demo.argument_types import more_than_zero, whole

__all__ = ["add_parser", "run"]

DESCRIPTION = """
Run torchft's Lighthouse, by which the workers of a job find each other and notice who is gone. It sees no parameters
and needs no state: if it ends, training goes on among those that are there, and a new one at the same address takes
over. One Lighthouse serves one job.
"""
_TICK = 0.05


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand and its arguments."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "lighthouse",
        help="run the server by which workers that come and go find each other",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--bind", default="0.0.0.0:29510", metavar="HOST:PORT", help="where to listen")
    parser.add_argument("--min-workers", type=whole(1), default=1, metavar="N", help="fewer do not train")
    parser.add_argument(
        "--heartbeat-timeout",
        type=more_than_zero,
        default=5.0,
        metavar="SECONDS",
        help="silence after which a worker is taken for lost",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends the process."""
    os.environ.setdefault("RUST_LOG", "error")
    try:
        from torchft.coordination import LighthouseServer
    except ImportError as error:
        raise UsageError("the Lighthouse is part of torchft: pip install torchft") from error
    silence = round(1000 * args.heartbeat_timeout)
    try:
        server = LighthouseServer(
            args.bind,
            args.min_workers,
            join_timeout_ms=silence,  # whoever is alive is waited for
            quorum_tick_ms=round(1000 * _TICK),
            heartbeat_timeout_ms=silence,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(f"cannot listen at {args.bind}: {error}") from error
    print(f"The Lighthouse listens at {server.address().rpartition('://')[2]}", flush=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    server.shutdown()
    return 0
