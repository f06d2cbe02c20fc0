"""Reports of a simulated run: a table, JSON and CSV files; the figure is in :mod:`.picture`."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lightning_async_localsgd.simulation.result import (
    Evaluation,
    LossPoint,
    SimulatedRound,
    SimulatedUpdate,
    SimulationResult,
)

__all__ = ["LiveTables", "format_duration", "format_table", "write_csv", "write_json"]


# ---- text ------------------------------------------------------------------------------------------------------------


def format_table(result: SimulationResult) -> str:
    """A run as plain text: a row per worker, then a summary in a few lines."""
    return f"{_workers(result)}\n\n{_totals(result)}"


def format_duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _workers(result: SimulationResult) -> str:
    rounds = Counter(round_.worker for round_ in result.rounds)
    header = ("worker", "steps/s", "local steps", "rounds", "utilization", "waiting", "sent", "received")
    rows = [
        (
            str(worker),
            f"{_ratio(result.local_steps[worker], result.busy_seconds[worker]):.4g}",
            f"{result.local_steps[worker]:,}",
            f"{rounds[worker]:,}",
            f"{_ratio(result.busy_seconds[worker], result.seconds):.1%}",
            f"{result.waiting_seconds[worker]:,.1f} s",
            _megabytes(result.bytes_sent[worker]),
            _megabytes(result.bytes_received[worker]),
        )
        for worker in range(result.workers)
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(lines)


def _totals(result: SimulationResult) -> str:
    lines = [
        ("virtual time", f"{format_duration(result.seconds)} ({result.seconds:,.1f} s)"),
        ("local steps", f"{result.total_local_steps:,} together, utilization {result.utilization:.1%}"),
        (
            "outer updates",
            f"{result.version:,}, staleness {result.mean_staleness:.2f} on average, {result.max_staleness} at most, "
            f"{sum(result.dropped)} dropped",
        ),
    ]
    if result.losses:
        lines.append(("training loss", _change(_first_and_last_losses(result))))
    lines += [
        (name, _change([evaluation.metrics.get(name, math.nan) for evaluation in result.evaluations]))
        for name in (result.evaluations[0].metrics if result.evaluations else ())
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)


def _first_and_last_losses(result: SimulationResult) -> tuple[float, float]:
    """The mean loss of the workers' first rounds, and of their last rounds."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for point in result.losses:
        first.setdefault(point.worker, point.loss)
        last[point.worker] = point.loss
    return sum(first.values()) / len(first), sum(last.values()) / len(last)


def _change(values: Sequence[float]) -> str:
    return f"{values[0]:.4g} -> {values[-1]:.4g}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


# ---- files -----------------------------------------------------------------------------------------------------------


def write_json(result: SimulationResult, path: Path, **more: Any) -> None:
    """Writes everything but the parameters as one JSON object.

    Args:
        result: The run.
        path: The file to write.
        **more: Further JSON values of the object.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(_finite(result.to_json() | more), indent=1) + "\n")
    unfinished.replace(path)  # readers find a whole file or none


def _finite(value: Any) -> Any:
    """``value`` with null for numbers that JSON lacks: an infinite bandwidth, the loss of a diverged run."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def write_csv(result: SimulationResult, folder: Path) -> None:
    """Writes ``rounds.csv``, ``losses.csv``, ``updates.csv`` and ``evaluations.csv``: a row per entry, in order.

    The columns are the fields; ``evaluations.csv`` has a row for each metric of each evaluation. Times are virtual
    seconds.
    """
    with closing(LiveTables(folder)) as tables:
        tables.add(result.rounds)
        tables.add(result.losses)
        tables.add(result.updates)
        tables.add(result.evaluations)


class LiveTables:
    """The CSV files of :func:`write_csv`, row by row while a run goes on.

    Args:
        folder: The folder of the files; made if it does not exist. Existing files are overwritten.
    """

    _KINDS: Mapping[type, str] = {
        SimulatedRound: "rounds",
        LossPoint: "losses",
        SimulatedUpdate: "updates",
        Evaluation: "evaluations",
    }

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {k: (folder / f"{n}.csv").open("w", newline="") for k, n in self._KINDS.items()}
        self._writers = {kind: csv.writer(file, lineterminator="\n") for kind, file in self._files.items()}
        for kind, writer in self._writers.items():
            writer.writerow(_columns(kind))

    def add(self, entries: Sequence[SimulatedRound | LossPoint | SimulatedUpdate | Evaluation]) -> None:
        """Appends rows, each to the file of its kind; they are in the files when this returns."""
        for entry in entries:
            self._writers[type(entry)].writerows(_rows(entry))
        for kind in {type(entry) for entry in entries}:
            self._files[kind].flush()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


def _columns(kind: type) -> list[str]:
    names = [field.name for field in fields(kind)]
    return [*names[:-1], "metric", "value"] if kind is Evaluation else names


def _rows(entry: SimulatedRound | LossPoint | SimulatedUpdate | Evaluation) -> Iterator[tuple[Any, ...]]:
    if isinstance(entry, Evaluation):
        for metric, value in entry.metrics.items():
            yield entry.time, entry.version, entry.local_steps, metric, value
    else:
        yield tuple(asdict(entry).values())
