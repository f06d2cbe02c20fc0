"""The report of the paper's tables: our figures beside the published ones, a check of its claims, pictures."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import _toy
from _paper_runs import (
    ASYNC_BUFFER,
    ASYNC_DILOCO,
    DN,
    LESSER,
    LEVELS,
    NONE,
    PRETRAINED,
    SINGLE,
    SIZES,
    SYNC,
    TOY,
    TUNED,
    TUNING_SEED,
    VERY,
    WORKERS,
    Grid,
    Result,
    Results,
    Run,
    parameters,
    seconds_per_step,
    tuning_level,
)

ASYNC_COMMON = f"{ASYNC_DILOCO}, common"
"""Async DiLoCo with the outer learning rate that is best on average over all levels of heterogeneity."""

PUBLISHED_HETEROGENEITY = {
    PRETRAINED: (61.64, 61.64, 61.64, 61.64),
    SINGLE: (42.47, 42.47, 42.47, 42.47),
    SYNC: (41.35, 41.35, 41.35, 41.35),
    ASYNC_DILOCO: (44.27, 44.38, 44.29, 44.27),
    DN: (41.27, 41.27, 41.09, 41.13),
}
PUBLISHED_WORKERS = {
    SYNC: (41.35, 41.23, 41.25),
    ASYNC_DILOCO: (44.27, 44.23, 44.23),
    DN: (41.13, 41.02, 40.98),
    f"{DN}-c": (41.16, 40.93, 41.04),
}
PUBLISHED_SIZES = {
    SYNC: (41.35, 24.55, 17.23),
    ASYNC_DILOCO: (44.27, 25.64, 18.08),
    DN: (41.13, 24.53, 17.26),
    f"{DN}-c": (41.16, 24.69, 17.27),
}
"""Final perplexity on C4, Liu et al. 2024."""
PUBLISHED_SIZE_NAMES = ("20M", "60M", "150M")
WORKER_COUNTS = (4, 8, 16)

LABELS = {
    PRETRAINED: "pretrained",
    SINGLE: "1 worker, 4x batch",
    SYNC: "synchronous DiLoCo",
    ASYNC_DILOCO: "async DiLoCo",
    ASYNC_COMMON: "async DiLoCo, one outer lr for all",
    ASYNC_BUFFER: "async buffer",
    "async-sgd": "async SGD",
    "async-momentum": "async momentum",
    "poly": "Poly",
    "polythres": "PolyThres",
    "delay-compensation": "delay compensation",
    DN: "DN + DyLU",
    f"{DN}-c": "DN + DyLU, c = 0.1",
    f"{DN}-fixed": "DN without DyLU",
    f"{DN}-grace": "DN + DyLU, grace period 0.5 s",
}
COLORS = {
    SINGLE: "#999999",
    SYNC: "#4477aa",
    ASYNC_DILOCO: "#ccbb44",
    ASYNC_BUFFER: "#228833",
    "async-sgd": "#66ccee",
    DN: "#aa3377",
    f"{DN}-c": "#ee99aa",
    f"{DN}-fixed": "#ee6677",
}


# ---- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """The runs of one method in one setting, over seeds."""

    values: tuple[float, ...]
    """Held-out perplexity (of the toy task: loss) by seed."""
    ratios: tuple[float, ...]
    """The same over synchronous DiLoCo's, of the seeds that both have."""
    times: tuple[float, ...]
    """Virtual time over synchronous DiLoCo's."""
    accuracies: tuple[float, ...] = ()

    @property
    def value(self) -> float | None:
        return mean(self.values)

    @property
    def ratio(self) -> float | None:
        return mean(self.ratios)

    @property
    def time(self) -> float | None:
        return mean(self.times)


class Figures:
    """Finds the runs of the tables and compares them with synchronous DiLoCo."""

    def __init__(self, grid: Grid, results: Results) -> None:
        self.grid = grid
        self.results = results

    def runs(self, row: str, **differences: Any) -> list[Run]:
        """The runs of a row: a method, or a variant of delayed Nesterov."""
        method, _, variant = row.partition("-") if row.startswith(f"{DN}-") else (row, "", "")
        if row == ASYNC_COMMON:
            common = self.results.common_outer_lr(self.grid, ASYNC_DILOCO)
            return [] if common is None else self.grid.runs(ASYNC_DILOCO, **{**differences, "outer_lr": common})
        level = differences.get("heterogeneity", VERY)
        options: dict[str, Any] = {"outer_lr": self.results.tuned_outer_lr(self.grid, method, level), **differences}
        if options["outer_lr"] is None:
            return []
        variants: dict[str, dict[str, Any]] = {
            "": {},
            "c": {"momentum_activation": 0.1},
            "fixed": {"pace": "fixed"},
            "grace": {"grace_period": 0.5},
        }
        return self.grid.runs(method, **options, **variants[variant])

    def found(self, row: str, **differences: Any) -> dict[int, Result]:
        return self.results.of(self.runs(row, **differences))

    def cell(self, row: str, **differences: Any) -> Cell:
        found = self.found(row, **differences)
        same = {name: value for name, value in differences.items() if name not in ("pace", "outer_lr")}
        sync = self.found(SYNC, **same)
        read: Callable[[Result], float] = toy_loss if differences.get("task") == TOY else perplexity
        both = [(found[seed], sync[seed]) for seed in found if seed in sync]
        timed = [(r, s) for r, s in both if "virtual_seconds" in r and row != SINGLE]
        return Cell(
            values=tuple(read(result) for result in found.values()),
            ratios=tuple(read(result) / read(base) for result, base in both),
            times=tuple(result["virtual_seconds"] / base["virtual_seconds"] for result, base in timed),
            accuracies=tuple(result["accuracy"] for result in found.values() if "accuracy" in result),
        )

    def by_level(self, row: str) -> list[Cell]:
        return [self.cell(row, heterogeneity=level) for level in LEVELS]

    def by_workers(self, row: str) -> list[Cell]:
        return [self.cell(row, workers=workers) for workers in WORKER_COUNTS]

    def by_size(self, row: str) -> list[Cell]:
        return [self.cell(row, task=size) for size in SIZES]


def perplexity(result: Result) -> float:
    return math.exp(result["loss"]) if result["loss"] < 700 else math.inf


def toy_loss(result: Result) -> float:
    return float(result["loss"])


def mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


# ---- tables ---------------------------------------------------------------------------------------------------------


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def beside(value: float | None, ratio: float | None, digits: int = 2) -> str:
    """A figure, and in brackets its ratio to synchronous DiLoCo's."""
    return number(value, digits) + (f" ({ratio:.3f})" if ratio is not None else "")


def compare(columns: Sequence[str], rows: dict[str, list[Cell]], published: dict[str, tuple[float, ...]]) -> str:
    """A table in which the published figures stand above ours."""
    lines = []
    for row, cells in rows.items():
        if row in published:
            theirs = [beside(p, p / s) for p, s in zip(published[row], published[SYNC], strict=True)]
            lines.append([LABELS[row], "published", *theirs])
        lines.append([LABELS[row], "here", *(beside(cell.value, cell.ratio) for cell in cells)])
    return as_table(["method", "figures", *columns], lines)


def heterogeneity_table(figures: Figures) -> str:
    rows = (PRETRAINED, SINGLE, SYNC, ASYNC_DILOCO, ASYNC_COMMON, ASYNC_BUFFER, f"{DN}-fixed", DN, f"{DN}-c")
    cells = {row: figures.by_level(row) for row in rows}
    times = [[LABELS[row], *(number(cell.time, 3) for cell in cells[row])] for row in rows[2:]]
    return "\n\n".join(
        [
            compare([*LEVELS], cells, PUBLISHED_HETEROGENEITY),
            "Virtual time over synchronous DiLoCo's at the same heterogeneity:",
            as_table(["method", *LEVELS], times),
        ]
    )


def methods_table(figures: Figures) -> str:
    lines = []
    for row in (SYNC, ASYNC_DILOCO, *LESSER, ASYNC_BUFFER, f"{DN}-fixed", f"{DN}-grace"):
        cells = [figures.cell(row, heterogeneity=level) for level in (NONE, VERY)]
        paced = figures.cell(row, pace="dylu") if row in TUNED else figures.cell(DN) if row == f"{DN}-fixed" else None
        if row == f"{DN}-grace":
            paced, cells = cells[1], [Cell((), (), ()), Cell((), (), ())]
        label = "delayed Nesterov" if row == f"{DN}-fixed" else LABELS[row].replace("DN + DyLU", "delayed Nesterov")
        runs = figures.runs(row)
        lr = number(runs[0].outer_lr, 3) if runs else ""
        with_dylu = beside(paced.value, paced.ratio) if paced else ""
        very = figures.found(row, pace="dylu") if row in TUNED else figures.found(row)
        staleness = number(mean([result["mean_staleness"] for result in very.values()]))
        lines.append([label, lr, *(beside(cell.value, cell.ratio) for cell in cells), with_dylu, staleness])
    header = ["method", "outer lr", "none", "very", "very, with DyLU", "mean staleness, last figure"]
    return as_table(header, lines)


def tuning_table(figures: Figures) -> str:
    lines = []
    tuned = [(method, level) for method in TUNED for level in LEVELS if tuning_level(method, level) == level]
    for method, level in tuned:
        losses = figures.results.tuning(figures.grid, method, level)
        tried = ", ".join(f"{lr:g}: {number(perplexity({'loss': loss}))}" for lr, loss in losses.items())
        chosen = figures.results.tuned_outer_lr(figures.grid, method, level)
        at_edge = " (the edge of what was tried)" if chosen in (TUNED[method][0], TUNED[method][-1]) else ""
        lines.append([LABELS[method], level, tried, f"{chosen:g}{at_edge}" if chosen is not None else ""])
    return as_table(["method", "devices", "perplexity by outer learning rate", "best"], lines)


def workers_table(figures: Figures) -> str:
    rows = (SYNC, ASYNC_DILOCO, DN, f"{DN}-c")
    return compare([f"{n} workers" for n in WORKER_COUNTS], {r: figures.by_workers(r) for r in rows}, PUBLISHED_WORKERS)


def sizes_table(figures: Figures) -> str:
    columns = [
        f"{theirs} / {ours} ({parameters(ours):,})" for theirs, ours in zip(PUBLISHED_SIZE_NAMES, SIZES, strict=True)
    ]
    rows = (SYNC, ASYNC_DILOCO, DN, f"{DN}-c")
    return compare(columns, {row: figures.by_size(row) for row in rows}, PUBLISHED_SIZES)


TOY_ROWS: dict[str, tuple[str, float | None]] = {
    "synchronous DiLoCo": (SYNC, None),
    "async DiLoCo, deltas times sqrt(k)/k": (ASYNC_DILOCO, 0.35),
    "async DiLoCo, outer lr 0.05": (ASYNC_DILOCO, 0.05),
    "async SGD": ("async-sgd", 0.5),
    "async buffer": (ASYNC_BUFFER, 0.7),
    "DN + DyLU": (DN, None),
}


def toy_options(outer_lr: float | None, level: str) -> dict[str, Any]:
    return {"task": TOY, "heterogeneity": level} | ({} if outer_lr is None else {"outer_lr": outer_lr})


def toy_table(figures: Figures) -> str:
    lines = []
    for label, (method, lr) in TOY_ROWS.items():
        cells = [figures.cell(method, **toy_options(lr, level)) for level in (NONE, VERY)]
        losses = [beside(cell.value, cell.ratio, 4) for cell in cells]
        accuracies = [f"{100 * a:.1f}%" if (a := mean(cell.accuracies)) is not None else "" for cell in cells]
        lines.append([label, *losses, *accuracies, number(cells[1].time, 3)])
    best = _toy.best_possible()
    accuracy = f"{100 * best['accuracy']:.1f}%"
    lines.append(["who knows the centres", *[number(best["loss"], 4)] * 2, accuracy, accuracy, ""])
    header = ["method", "loss, none", "loss, very", "accuracy, none", "accuracy, very", "virtual time over sync, very"]
    return as_table(header, lines)


def conditions(figures: Figures) -> str:
    """The common conditions of the runs."""
    grid = figures.grid
    speeds = "; ".join(
        f"{level}: {', '.join(f'{s:.2f}' for s in seconds_per_step(level, WORKERS))}" for level in LEVELS
    )
    return "\n".join(
        [
            f"- Seconds per local step of the four workers: {speeds}.",
            f"- {grid.steps:,} local steps per worker ({grid.steps // 2:,} with 16 workers, {grid.toy_steps:,} of the "
            f"toy task), H = {grid.local_steps}, after {grid.pretrain_steps:,} steps of pretraining; "
            f"seeds {', '.join(map(str, grid.seeds))}, tuning on seed {TUNING_SEED}.",
        ]
    )


# ---- claims ---------------------------------------------------------------------------------------------------------


def claims_table(figures: Figures) -> str:
    """The paper's claims, and whether each holds here."""
    dn = figures.by_level(DN)
    very = figures.cell(DN)
    rest = [*figures.by_workers(DN)[1:], *figures.by_size(DN)[1:]]
    equal = [abs(ratio - 1) for ratio in dn[0].ratios]
    others = [figures.cell(f"{DN}-fixed", heterogeneity=level) for level in LEVELS]
    buffered = [figures.cell(ASYNC_BUFFER, heterogeneity=level) for level in LEVELS]
    lines = [
        _claim("DN + DyLU over sync: none, slight, moderate, very", "0.998, 0.998, 0.994, 0.995", dn, 1.0),
        [
            "DN + DyLU equals sync without heterogeneity (largest difference of a seed)",
            "0.002",
            f"{max(equal):.1e}" if equal else "",
            _holds(max(equal) < 1e-3 if equal else None),
        ],
        *(
            _claim(f"async DiLoCo, {tuned}, over sync", "1.071, 1.073, 1.071, 1.071", cells, 1.05, at_least=True)
            for tuned, cells in (
                ("one outer learning rate for all levels", figures.by_level(ASYNC_COMMON)),
                ("tuned at each level", figures.by_level(ASYNC_DILOCO)),
            )
        ),
        _worse("DN without DyLU over DN + DyLU", others, dn),
        _worse("async buffer over DN + DyLU", buffered, dn),
        [
            "virtual time of DN + DyLU over sync's, very",
            "",
            number(very.time, 3),
            _holds(very.time <= 0.32 if very.time is not None else None),
        ],
        _claim("DN + DyLU over sync: 8 workers, 16 workers, larger models", "0.995, 0.993, 0.999, 1.002", rest, 1.0),
    ]
    return as_table(["claim", "published", "here", "holds here"], lines)


def _claim(claim: str, published: str, cells: list[Cell], limit: float, at_least: bool = False) -> list[str]:
    ratios = [round(cell.ratio, 3) for cell in cells if cell.ratio is not None]
    verdict = None
    if len(ratios) == len(cells):
        verdict = all(ratio >= limit if at_least else ratio <= limit for ratio in ratios)
    bound = f"{'at least' if at_least else 'at most'} {limit:.3f}"
    return [f"{claim}, {bound}", published, ", ".join(number(ratio, 3) for ratio in ratios), _holds(verdict)]


def _worse(claim: str, cells: list[Cell], than: list[Cell]) -> list[str]:
    pairs = [
        (a.value, b.value) for a, b in zip(cells, than, strict=True) if a.value is not None and b.value is not None
    ]
    ratios = [round(a / b, 3) for a, b in pairs]
    verdict = all(ratio >= 1.0 for ratio in ratios) if len(ratios) == len(cells) else None
    return [f"{claim}, at least 1.000", "worse", ", ".join(number(ratio, 3) for ratio in ratios), _holds(verdict)]


def _holds(verdict: bool | None) -> str:
    return {None: "not known yet", True: "yes", False: "**no**"}[verdict]


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw_heterogeneity(figures: Figures, path: Path) -> None:
    """Left: what is published, dashed, and ours over heterogeneity. Right: all methods with very unequal devices."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    levels, bars = figure.subplots(1, 2, width_ratios=(1.2, 1))
    positions = range(len(LEVELS))
    levels.axhline(1, color=COLORS[SYNC], linewidth=1)
    levels.text(-0.35, 1.0, "synchronous DiLoCo", color=COLORS[SYNC], va="bottom", fontsize=8)
    for row in (SINGLE, ASYNC_DILOCO, ASYNC_BUFFER, f"{DN}-fixed", f"{DN}-c", DN):
        ratios = [math.nan if cell.ratio is None else cell.ratio for cell in figures.by_level(row)]
        levels.plot(positions, ratios, "o-", color=COLORS[row], label=LABELS[row], markersize=4)
        if row in PUBLISHED_HETEROGENEITY:
            sync = PUBLISHED_HETEROGENEITY[SYNC]
            theirs = [p / s for p, s in zip(PUBLISHED_HETEROGENEITY[row], sync, strict=True)]
            levels.plot(positions, theirs, "s--", color=COLORS[row], markersize=4, alpha=0.6)
    levels.plot([], [], "s--", color="#666666", alpha=0.6, label="published, same colour")
    levels.set_xticks(positions, [*LEVELS])
    levels.set_xlim(-0.4, len(LEVELS) - 0.6)
    levels.set_xlabel("heterogeneity of the devices")
    levels.set_ylabel("perplexity over synchronous DiLoCo's")
    levels.set_title("Heterogeneity, mean of the seeds", loc="left")
    levels.grid(alpha=0.25)
    figure.legend(*levels.get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    _draw_methods(bars, figures)
    for axes in (levels, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_methods(axes: Any, figures: Figures) -> None:
    cells = {
        LABELS[row]: (figures.cell(row), COLORS.get(row, "#bbbbbb")) for row in (SINGLE, f"{DN}-fixed", DN, f"{DN}-c")
    }
    for method in TUNED:
        color = COLORS.get(method, "#bbbbbb")
        cells[LABELS[method]] = (figures.cell(method), color)
        cells[f"{LABELS[method]} + DyLU"] = (figures.cell(method, pace="dylu"), color)
    ordered = sorted(
        ((c.ratio, n, c, color) for n, (c, color) in cells.items() if c.ratio is not None), key=lambda x: x[0]
    )
    for position, (ratio, _, cell, color) in enumerate(ordered):
        axes.barh(position, ratio - 1, 0.62, left=1, color=color)
        axes.plot(cell.ratios, [position] * len(cell.ratios), "|", color="black", markersize=7)
        axes.text(max(1.0, *cell.ratios), position, f"  {ratio:.3f}", va="center", fontsize=8)
    axes.axvline(1, color=COLORS[SYNC], linewidth=1)
    axes.set_yticks(range(len(ordered)), [name for _, name, _, _ in ordered], fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    axes.set_xlabel("perplexity over synchronous DiLoCo's, and seeds")
    axes.set_title("Very unequal devices, all methods", loc="left")


def draw_curves(figures: Figures, path: Path) -> None:
    """Held-out loss with very unequal devices, over local steps and over virtual time."""
    rows = (SYNC, ASYNC_DILOCO, ASYNC_BUFFER, f"{DN}-fixed", DN)
    found = {LABELS[row]: (figures.found(row), COLORS[row]) for row in rows}
    _draw_pairs([("", found)], "held-out loss (nats per token)", path)


def draw_toy(figures: Figures, path: Path) -> None:
    """The toy task without heterogeneity and with very unequal devices, over local steps and over virtual time."""
    shown = []
    for level in (NONE, VERY):
        found = {}
        for label, (method, lr) in TOY_ROWS.items():
            color = "#ddaa33" if lr == 0.05 else COLORS[method]
            found[label] = (figures.found(method, **toy_options(lr, level)), color)
        shown.append((f"{level}: ", found))
    _draw_pairs(shown, "held-out loss (nats)", path)


def _draw_pairs(shown: list[tuple[str, dict[str, tuple[dict[int, Result], str]]]], loss: str, path: Path) -> None:
    figure = Figure(figsize=(12, 4.6 * len(shown)), layout="constrained")
    for (title, found), (by_steps, by_time) in zip(shown, figure.subplots(len(shown), 2, squeeze=False), strict=True):
        for axes, column, name in ((by_steps, 2, "local steps of all workers"), (by_time, 0, "virtual seconds")):
            for label, (results, color) in found.items():
                if results:
                    at, losses = mean_curve([*results.values()], column)
                    axes.plot(at, losses, color=color, label=label)
                    axes.plot(at[-1], losses[-1], "o", color=color, markersize=4)
            axes.set_xlabel(name)
            axes.set_title(f"{title}over {name}", loc="left")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        by_steps.set_ylabel(loss)
        if by_time.lines:
            by_time.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def mean_curve(results: list[Result], column: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean held-out loss of several runs over virtual time (column 0) or local steps (2), up to their mean end."""
    grid = np.linspace(0.0, 1.0, 101)
    curves = [np.array(result["curve"], dtype=float) for result in results]
    losses = [np.interp(grid, curve[:, column] / curve[-1, column], curve[:, 3]) for curve in curves]
    return grid * fmean(curve[-1, column] for curve in curves), np.mean(losses, axis=0)


# ---- the report -----------------------------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[Figures], str]] = {
    "claims": claims_table,
    "conditions": conditions,
    "heterogeneity": heterogeneity_table,
    "methods": methods_table,
    "tuning": tuning_table,
    "workers": workers_table,
    "sizes": sizes_table,
    "toy": toy_table,
}
"""The parts of ``docs/reproduction.md`` between ``<!-- paper: NAME -->`` and ``<!-- end -->``."""


def report(grid: Grid, results: Results, folder: Path, document: Path) -> None:
    """Draw the pictures, write all figures as JSON and put the tables in their places in the document."""
    figures = Figures(grid, results)
    folder.mkdir(parents=True, exist_ok=True)
    draw_heterogeneity(figures, folder / "paper_heterogeneity.png")
    draw_curves(figures, folder / "paper_curves.png")
    draw_toy(figures, folder / "paper_toy.png")
    (folder / "paper.json").write_text(json.dumps(as_json(figures), indent=2) + "\n")
    text = document.read_text() if document.exists() else ""
    for name, block in BLOCKS.items():
        opening, closing = f"<!-- paper: {name} -->", "<!-- end -->"
        filled = f"{opening}\n\n{block(figures)}\n\n{closing}"
        if opening in text:
            text = re.sub(rf"{opening}.*?{closing}", lambda _, filled=filled: filled, text, count=1, flags=re.DOTALL)
        else:
            text += f"\n{filled}\n"
    document.write_text(text)
    print(f"\n{claims_table(figures)}\n\nWritten: {folder}/paper.json and paper_*.png, tables of {document}.")


def as_json(figures: Figures) -> dict[str, Any]:
    """Figures of the tables: perplexity, its ratio to synchronous DiLoCo's and virtual time, by seed."""

    def values(cells: Sequence[Cell], names: Sequence[str]) -> dict[str, Any]:
        return {name: vars(cell) | {"mean_ratio": cell.ratio} for name, cell in zip(names, cells, strict=True)}

    rows = (SINGLE, SYNC, ASYNC_DILOCO, ASYNC_BUFFER, f"{DN}-fixed", DN, f"{DN}-c")
    compared = (SYNC, ASYNC_DILOCO, DN, f"{DN}-c")
    workers = [str(n) for n in WORKER_COUNTS]
    return {
        "heterogeneity": {row: values(figures.by_level(row), [*LEVELS]) for row in rows},
        "with_dylu": {method: vars(figures.cell(method, pace="dylu")) for method in TUNED},
        "workers": {row: values(figures.by_workers(row), workers) for row in compared},
        "sizes": {row: values(figures.by_size(row), [*SIZES]) for row in compared},
        "tuning": {method: figures.results.tuning(figures.grid, method) for method in TUNED},
    }
