"""A figure of a simulated run: its loss over outer updates and over time, its rounds, its staleness."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from pathlib import Path
from statistics import fmean

from lightning_async_localsgd.simulation.report import format_duration
from lightning_async_localsgd.simulation.result import (
    Evaluation,
    LossPoint,
    SimulatedRound,
    SimulatedWait,
    SimulationResult,
)

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("There is no picture, for matplotlib is not installed: pip install matplotlib") from error

__all__ = ["draw", "make_figure"]

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_WAITING = "#dddddd"
_LANES = 16
_ROUNDS = 20  # of the worker with the fastest rounds
_BARS = 40  # of the histogram


def draw(result: SimulationResult, path: Path) -> None:
    """Writes the picture of a run as a PNG, see :func:`make_figure`."""
    figure = make_figure(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def make_figure(result: SimulationResult) -> Figure:
    """The picture of a run.

    Held-out points are the first metric with "loss" in its name. The figure shows at most the first 16 workers, and the
    time of the fastest worker's first 20 rounds.
    """
    lanes = min(result.workers, _LANES)
    lower = 2.6 + 0.2 * lanes
    figure = Figure(figsize=(13, 4.4 + lower), layout="constrained")
    (updates, time), (rounds, staleness) = figure.subplots(2, 2, height_ratios=(4, lower))
    time.sharey(updates)
    figure.suptitle(
        f"{result.workers} workers, {result.total_local_steps:,} local steps in {format_duration(result.seconds)} "
        f"of virtual time, utilization {result.utilization:.1%}"
    )
    _draw_loss_over_updates(updates, result)
    _draw_loss_over_time(time, result)
    _draw_rounds(rounds, result, lanes)
    _draw_staleness(staleness, result)
    return figure


# ---- the loss --------------------------------------------------------------------------------------------------------


def _draw_loss_over_updates(axes: Axes, result: SimulationResult) -> None:
    times = [update.time for update in result.updates]
    versions = [0, *(update.version for update in result.updates)]
    trained = [float(versions[bisect_right(times, point.time)]) for point in _by_time(result.losses)]
    _draw_losses(axes, result, trained, [float(evaluation.version) for evaluation in result.evaluations])
    axes.set_xlabel("outer updates")
    axes.set_title("loss over outer updates", loc="left", fontsize="medium")


def _draw_loss_over_time(axes: Axes, result: SimulationResult) -> None:
    scale, unit = _unit(result.seconds)
    trained = [point.time / scale for point in _by_time(result.losses)]
    _draw_losses(axes, result, trained, [evaluation.time / scale for evaluation in result.evaluations])
    axes.set_xlabel(f"virtual time ({unit})")
    axes.set_title("loss over virtual time", loc="left", fontsize="medium")


def _draw_losses(axes: Axes, result: SimulationResult, trained: list[float], evaluated: list[float]) -> None:
    losses = [point.loss for point in _by_time(result.losses)]
    axes.plot(trained, losses, ".", color=COLORS[0], alpha=0.35, markersize=5, markeredgewidth=0)
    axes.plot(trained, _smoothed(losses), color=COLORS[0], label="training, smoothed")
    if name := _loss_name(result.evaluations):
        held_out = [evaluation.metrics.get(name, float("nan")) for evaluation in result.evaluations]
        axes.plot(evaluated, held_out, "D-", color="black", markersize=4, linewidth=0.8, label=name)
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if result.losses or result.evaluations:
        # Above the axes, where no curve is.
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2, fontsize="small")


def _by_time(losses: list[LossPoint]) -> list[LossPoint]:
    """Losses sorted by time: rounds are reported when their deltas are applied, not in the order of their ends."""
    return sorted(losses, key=lambda point: point.time)


def _loss_name(evaluations: list[Evaluation]) -> str | None:
    names = evaluations[0].metrics if evaluations else {}
    return next((name for name in names if "loss" in name.lower()), None)


def _smoothed(values: list[float]) -> list[float]:
    """The mean of each value and as many neighbours before as after it: a centred mean does not lag."""
    reach = max(2, len(values) // 50)
    reaches = [min(reach, index, len(values) - 1 - index) for index in range(len(values))]
    return [fmean(values[index - near : index + near + 1]) for index, near in enumerate(reaches)]


# ---- the rounds ------------------------------------------------------------------------------------------------------


def _draw_rounds(axes: Axes, result: SimulationResult, lanes: int) -> None:
    by_worker: list[list[SimulatedRound]] = [[] for _ in range(lanes)]
    for round_ in result.rounds:
        if round_.worker < lanes:
            by_worker[round_.worker].append(round_)
    window = min((rounds[_ROUNDS - 1].end for rounds in by_worker if len(rounds) >= _ROUNDS), default=result.seconds)
    scale, unit = _unit(window)
    for worker, rounds in enumerate(by_worker):
        # Time outside rounds is time without a step of the worker.
        until = max((max(round_.end, round_.adopted) for round_ in rounds), default=0.0)
        axes.barh(worker, min(until, window) / scale, height=0.7, color=_WAITING, linewidth=0)
        _draw_lane(axes, worker, [round_ for round_ in rounds if round_.begin < window], window, scale)
        _draw_waits(
            axes, [wait for wait in result.waits if wait.worker == worker and wait.begin < window], window, scale
        )
    axes.set_yticks(range(lanes), [f"worker {worker}" for worker in range(lanes)], fontsize="small")
    axes.set_ylim(lanes - 0.5, -0.5)
    axes.set_xlim(0, window / scale or 1)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"virtual time ({unit})")
    axes.set_title(_rounds_title(result, lanes, window), loc="left", fontsize="medium")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_lane(axes: Axes, worker: int, rounds: list[SimulatedRound], window: float, scale: float) -> None:
    color = COLORS[worker % len(COLORS)]
    for index, round_ in enumerate(rounds):
        end = min(round_.end, window)
        width = (end - round_.begin) / scale
        left = round_.begin / scale
        # White underneath, because the colour is translucent and must not look like waiting.
        axes.barh(worker, width, left=left, height=0.7, color="white", linewidth=0)
        axes.barh(worker, width, left=left, height=0.7, color=color, alpha=(0.85, 0.6)[index % 2], linewidth=0)
        # A narrow bar has no room for a number; a bar that is cut off would show it in the wrong place.
        if width * scale > 0.008 * window * (2 + len(str(round_.local_steps))) and round_.end <= window:
            axes.text(left + width / 2, worker, str(round_.local_steps), ha="center", va="center", fontsize=7)


def _draw_waits(axes: Axes, waits: list[SimulatedWait], window: float, scale: float) -> None:
    """Draw waits over the lane, because a worker can also wait within a round."""
    for wait in waits:
        width = (min(wait.end, window) - wait.begin) / scale
        axes.barh(wait.worker, width, left=wait.begin / scale, height=0.7, color=_WAITING, linewidth=0)


def _rounds_title(result: SimulationResult, lanes: int, window: float) -> str:
    shown = f" of workers 0 to {lanes - 1}" if lanes < result.workers else ""
    until = f", up to {format_duration(window)}" if window < result.seconds else ""
    return f"rounds{shown}{until}, with their local steps; grey: waiting"


# ---- the staleness ---------------------------------------------------------------------------------------------------


def _draw_staleness(axes: Axes, result: SimulationResult) -> None:
    counts = Counter(update.staleness for update in result.updates)
    wide = 1 + max(counts, default=0) // _BARS
    bars = Counter({0: 0})
    for staleness, count in counts.items():
        bars[staleness // wide] += count
    axes.bar(
        [(bar + 0.5) * wide - 0.5 for bar in bars], list(bars.values()), width=0.9 * wide, color=COLORS[0], linewidth=0
    )
    axes.axvline(result.mean_staleness, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlim(-0.6, (max(bars) + 1) * wide - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("staleness (outer updates)")
    axes.set_ylabel("deltas")
    axes.set_title(
        f"staleness: {result.mean_staleness:.2f} on average (dashed), {result.max_staleness} at most",
        loc="left",
        fontsize="medium",
    )
    axes.spines[["top", "right"]].set_visible(False)


def _unit(seconds: float) -> tuple[float, str]:
    """The length of the most readable unit of time for ``seconds``, in seconds, and its name."""
    if seconds <= 300:
        return 1, "seconds"
    return (60, "minutes") if seconds <= 3 * 3600 else (3600, "hours")
