"""``async-localsgd plan``: tells what a setting would cost, and which H and codec to take, without training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.cli.job import (
    STEP_TIMES,
    add_method,
    add_network,
    add_workers,
    read_network,
    read_settings,
    read_speeds,
)
from lightning_async_localsgd.cli.usage import HelpFormatter, UsageError, refusals
from lightning_async_localsgd.demo.argument_types import at_least, more_than_zero, whole

if TYPE_CHECKING:
    from lightning_async_localsgd.simulation import Plan, Recommendation

__all__ = ["add_parser", "run"]

DESCRIPTION = f"""
Predict utilization, exposed time, traffic and memory of a run, without training: the simulator's clock, with workers
that learn nothing. Then every H and codec is tried, to find the smallest H that uses 99% of the devices' time. Without
arguments: a model of 125 million parameters on the four devices of the paper's toy experiment,
{", ".join(map(str, STEP_TIMES))} seconds per step.
"""


# ---- the arguments ---------------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand and its arguments."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="predict time, traffic and memory of a run, and find the H and codec that do",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    job = parser.add_argument_group("model and hosts")
    job.add_argument("--parameters", type=at_least(1), default=125e6, metavar="P", help="that are trained, as in 125e6")
    job.add_argument(
        "--memory-bandwidth", type=more_than_zero, default=10.0, metavar="GB", help="GB/s of one thread of a host"
    )
    job.add_argument("--seed", type=whole(0), default=0, help="of the noise")
    job.add_argument("--json", type=Path, metavar="PATH", help="where all figures are written as well")
    add_workers(parser)
    add_network(parser)
    add_method(parser, local_steps=50)
    parser.set_defaults(run=run)


# ---- the plan --------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Plans what the arguments describe; returns the exit code.

    Raises:
        UsageError: if they describe nothing that could be run.
    """
    speeds = read_speeds(args)
    with refusals():
        network = read_network(args, len(speeds))
        settings = read_settings(args, len(speeds))
        from lightning_async_localsgd.simulation import plan, recommend

        if args.json is not None and args.json.is_dir():
            raise UsageError(f"--json {args.json} is a folder: give the file to write")
        options = {"noise": args.noise, "memory_bandwidth": args.memory_bandwidth * 1e9, "seed": args.seed}
        parameters = round(args.parameters)
        asked = plan(parameters, speeds, network=network, **options, **settings)
        others = {name: value for name, value in settings.items() if name not in ("local_steps", "codec")}
        recommended = recommend(parameters, speeds, network=network, **options, **others)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(_to_json(asked, recommended), indent=2) + "\n")
    print(f"{_describe(asked)}\n\n{_compare(recommended.plans)}\n\n{recommended.sentence}")
    return 0


def _to_json(asked: Plan, recommended: Recommendation) -> dict[str, Any]:
    return {
        "plan": asked.to_json(),
        "tried": [plan.to_json() for plan in recommended.plans],
        "best": None if recommended.best is None else recommended.best.to_json(),
        "recommendation": recommended.sentence,
    }


# ---- to read ---------------------------------------------------------------------------------------------------------


def _describe(plan: Plan) -> str:
    exposed = sum(plan.exposed_seconds) / plan.workers
    longer = "" if plan.keeps_rounds else f", not {plan.local_steps}: they wait for the exchange before them"
    flight = f", {plan.steps_in_flight:.1f} steps of the fastest worker" if plan.overlap else ""
    need = (
        f"{_mbit(plan.link_need)} if exchanges are to keep up" if plan.link_need < float("inf") else "no rate keeps up"
    )
    parts = f", {plan.fragments} fragments" if plan.fragments > 1 else ""
    model = f"{plan.workers} workers, {plan.parameters:,} parameters"
    rows = (
        ("setting", f"{model}, H = {plan.local_steps}, {plan.codec}{parts}"),
        ("utilization", f"{plan.utilization:.1%}, {plan.steps_per_second:.4g} local steps per second together"),
        ("round", f"{_seconds(plan.round_seconds)}, {plan.round_steps:.1f} steps of the fastest worker{longer}"),
        ("exposed", f"{_seconds(exposed)} per round on average, {_seconds(max(plan.exposed_seconds))} at most"),
        ("exchange", f"{_seconds(plan.exchange_seconds)} from {'a push' if parts else 'the end of a round'}{flight}"),
        ("traffic", f"{_bytes(plan.bytes_per_round)} sent per worker and round, as much received"),
        ("", f"{_bytes(plan.bytes_per_1000_steps)} per 1,000 local steps of each worker"),
        ("link", f"{_mbit(plan.link_load)} on average, {need}"),
        ("host memory", f"{_bytes(plan.memory)} per worker beside model and optimizer"),
        ("staleness", f"{plan.mean_staleness:.2f} on average, {plan.max_staleness} at most"),
    )
    return "\n".join(f"{name:13}{text}" for name, text in rows)


def _compare(plans: Sequence[Plan]) -> str:
    """A row per codec and H, and one for those H of a codec that come to the same."""
    header = ("codec", "H", "utilization", "steps/round", "exposed/round", "exchange", "sent/round", "staleness", "99%")
    rows = [header, *_joined([_row(plan) for plan in plans])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(plan: Plan) -> tuple[str, ...]:
    return (
        plan.codec,
        str(plan.local_steps),
        f"{plan.utilization:.1%}",
        f"{plan.round_steps:.1f}",
        _seconds(max(plan.exposed_seconds)),
        _seconds(plan.exchange_seconds),
        _bytes(plan.bytes_per_round),
        f"{plan.mean_staleness:.2f}",
        "yes" if plan.reaches_target else "no",
    )


def _joined(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows, where those that follow each other and differ in H alone are one."""
    joined: list[tuple[str, ...]] = []
    for (codec, *figures), group in groupby(rows, key=lambda row: (row[0], *row[2:])):
        steps = [row[1] for row in group]
        joined.append((codec, steps[0] if len(steps) == 1 else f"{steps[0]}-{steps[-1]}", *figures))
    return joined


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"


def _mbit(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8 / 1e6:,.1f} Mbit/s"
