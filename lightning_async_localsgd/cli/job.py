"""What commands are told of a job in the same words: its workers, the network between them and the method."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.cli.usage import UsageError
from lightning_async_localsgd.demo.argument_types import at_least, more_than_zero, whole, whole_or_auto

if TYPE_CHECKING:
    from lightning_async_localsgd.simulation import Network

__all__ = ["add_method", "add_network", "add_workers", "read_network", "read_settings", "read_speeds"]

STEP_TIMES = (0.58, 0.75, 1.51, 3.33)  # seconds: the devices of the paper's toy experiment
_MEGABIT = 1e6 / 8  # bytes


# ---- the arguments ---------------------------------------------------------------------------------------------------


def add_workers(parser: argparse.ArgumentParser) -> None:
    """How many there are, and how fast."""
    workers = parser.add_argument_group("workers")
    workers.add_argument("--workers", type=whole(1), metavar="N", help="their number; the speeds are repeated in turn")
    device = workers.add_mutually_exclusive_group()
    device.add_argument("--speeds", type=more_than_zero, nargs="+", metavar="S", help="local steps per second")
    device.add_argument("--step-times", type=more_than_zero, nargs="+", metavar="S", help="seconds per local step")
    workers.add_argument("--noise", type=at_least(0), default=0.0, help="deviation of step times, as a part of them")


def add_network(parser: argparse.ArgumentParser) -> None:
    """What joins them."""
    network = parser.add_argument_group("network")
    network.add_argument(
        "--latency", type=at_least(0), default=0.0, metavar="MS", help="milliseconds that any message takes"
    )
    network.add_argument("--bandwidth", type=more_than_zero, metavar="MBIT", help="Mbit/s of each worker; no limit")
    network.add_argument("--sites", type=whole(0), nargs="+", metavar="SITE", help="number of each worker's site; one")
    network.add_argument("--site-latency", type=at_least(0), metavar="MS", help="further milliseconds between sites")
    network.add_argument(
        "--site-bandwidth", type=more_than_zero, metavar="MBIT", help="Mbit/s that a site's workers share; no limit"
    )


def add_method(parser: argparse.ArgumentParser, local_steps: int | str) -> None:
    """How they learn from each other.

    Args:
        parser: whose arguments.
        local_steps: default of H; a number, if it has to be one.
    """
    method = parser.add_argument_group("method (settings that are not given are the method's)")
    method.add_argument("--method", default="dn-growing", metavar="NAME", help="one of --list-methods")
    method.add_argument("--list-methods", action=_ListMethods, help="show the methods and exit")
    method.add_argument(
        "--local-steps",
        type=whole(1) if isinstance(local_steps, int) else whole_or_auto,
        default=local_steps,
        metavar="H",
        help="per round of the fastest worker",
    )
    method.add_argument("--outer-lr", type=more_than_zero, metavar="LR", help="outer learning rate")
    method.add_argument("--outer-momentum", type=at_least(0), metavar="BETA", help="momentum of the outer optimizer")
    method.add_argument("--pace", metavar="NAME", help="dylu or fixed")
    method.add_argument("--grace-period", type=at_least(0), metavar="SECONDS", help="virtual")
    method.add_argument("--quorum", type=whole(1), metavar="N", help="deltas per outer update")
    method.add_argument("--overlap", action=argparse.BooleanOptionalAction, help="train during an exchange")
    method.add_argument("--codec", metavar="NAME", help="how deltas are sent: fp32, bf16, ...")
    method.add_argument("--fragments", type=whole(1), metavar="P", help="of the model, exchanged one after the other")


class _ListMethods(argparse.Action):
    """Prints the methods and what each does, and exits."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from lightning_async_localsgd.methods import METHODS

        width = max(map(len, METHODS))
        print("\n".join(f"{name.ljust(width)}  {method.description}" for name, method in METHODS.items()))
        parser.exit()


# ---- what they mean --------------------------------------------------------------------------------------------------


def read_speeds(args: argparse.Namespace) -> list[float]:
    """Local steps per second of each worker.

    Raises:
        UsageError: if there are more speeds than workers.
    """
    given: Sequence[float] = args.speeds or [1 / seconds for seconds in args.step_times or STEP_TIMES]
    chosen = bool(args.speeds or args.step_times)
    workers = args.workers or len(given)
    if chosen and workers < len(given):
        raise UsageError(f"{len(given)} speeds for --workers {workers}: give at most as many as there are workers")
    return list(islice(cycle(given), workers))


def read_network(args: argparse.Namespace, workers: int) -> Network:
    """The network.

    Raises:
        UsageError: if the sites are not those of these workers.
    """
    if args.sites is None and (args.site_latency is not None or args.site_bandwidth is not None):
        raise UsageError("--site-latency and --site-bandwidth are those between sites: give the --sites of the workers")
    if args.sites is not None and len(args.sites) != workers:
        raise UsageError(f"--sites gives {len(args.sites)} sites for {workers} workers: give that of each worker")
    from lightning_async_localsgd.simulation import Network

    return Network(
        latency=args.latency / 1000,
        bandwidth=_bytes_per_second(args.bandwidth),
        sites=None if args.sites is None else tuple(args.sites),
        site_latency=(args.site_latency or 0.0) / 1000,
        site_bandwidth=_bytes_per_second(args.site_bandwidth),
    )


def _bytes_per_second(megabits: float | None) -> float:
    return math.inf if megabits is None else megabits * _MEGABIT


def read_settings(args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """The method's fields of `Settings`, and over them what was given; checked.

    Raises:
        ValueError: if they are impossible.
    """
    from lightning_async_localsgd.methods import make_method
    from lightning_async_localsgd.settings import Settings

    fields = make_method(args.method, workers, args.outer_lr, args.outer_momentum, args.pace)
    names = ("local_steps", "grace_period", "quorum", "overlap", "codec", "fragments")
    fields |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    Settings(**fields).check_workers(workers)
    return fields
