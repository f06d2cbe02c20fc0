"""The outer update of a turn with 4 deltas, over the time to stream the memory that it must touch once.

An outer update of delayed Nesterov reads the pseudo-gradient, and reads and writes momentum and parameters: 5 streams.
With momentum activation it reads and writes a buffer too, and writes the momentum only at the end of one: 6 or 7.
The unit is the time of so many streams in a memory copy, which is 2 of them, in the same run on one thread. Compared
are the sum form (one step with count=4) and a step for each of the 4 deltas.

    python benchmarks/outer_update.py [--parameters 25] [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.nn import Parameter

from lightning_async_localsgd.outer import DelayedNesterov

RESULTS = Path(__file__).parent / "results"
DELTAS = 4
BUFFER = 8  # a turn is half a buffer: one in two ends it
BAR = 1.5  # streaming passes that the sum form may take


class Update:
    """Turns of one optimizer.

    ``streams`` is the number of vectors that an outer update reads or writes at least, on average.

    Args:
        parameters: number of elements.
        counts: the number of pseudo-gradients in each step of a turn.
        activation: momentum activation, times the buffer size.
    """

    def __init__(self, parameters: int, counts: list[int], activation: float) -> None:
        parameter = Parameter(torch.zeros(parameters))
        parameter.grad = torch.full((parameters,), 1e-3)
        self.streams = 6.5 if activation else 5.0
        self._counts = counts
        self._optimizer = DelayedNesterov([parameter], buffer_size=BUFFER, momentum_activation=activation / BUFFER)

    def __call__(self) -> None:
        """Two turns, of which the second one ends the buffer."""
        for count in self._counts * 2:
            self._optimizer.step(count=count)


def seconds(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(parameters: int, repeats: int) -> dict[str, Any]:
    """Streaming passes of each form in every repeat, in which all forms and the copy take turns."""
    source, target = torch.ones(parameters), torch.ones(parameters)
    forms = {
        "sum of 4": Update(parameters, [DELTAS], 0.0),
        "4 single deltas": Update(parameters, [1] * DELTAS, 0.0),
        "sum of 4, c = 1/N": Update(parameters, [DELTAS], 1.0),
    }
    for update in forms.values():
        update()
    passes: dict[str, list[float]] = {name: [] for name in forms}
    gigabytes = []
    for _ in range(repeats):
        copy = median(seconds(lambda: target.copy_(source)) for _ in range(3))
        gigabytes.append(8 * parameters / copy / 1e9)
        for name, update in forms.items():
            passes[name].append(seconds(update) / 2 / (copy * update.streams / 2))
    return {
        "parameters": parameters,
        "copy_gigabytes_per_second": median(gigabytes),
        "passes": passes,
        "median": {name: median(found) for name, found in passes.items()},
        "bar": BAR,
    }


def draw(figures: dict[str, Any], path: Path) -> None:
    """One bar per form."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    names = list(figures["median"])
    axes.barh(names, list(figures["median"].values()), color="tab:blue", alpha=0.7)
    for i, name in enumerate(names):
        axes.plot(figures["passes"][name], [i] * len(figures["passes"][name]), "k|")
    axes.axvline(BAR, color="tab:red", linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel("streaming passes per turn (marks: repeats; dashed: the bar)")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=25, help="millions of parameters")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(int(args.parameters * 1e6) // (10 if args.quick else 1), 3 if args.quick else args.repeats)
    print(f"a copy: {figures['copy_gigabytes_per_second']:.1f} GB/s, read and written")
    for name, found in figures["median"].items():
        print(f"{name}: {found:.2f} streaming passes")
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "outer_update.json").write_text(json.dumps(figures, indent=2) + "\n")
        draw(figures, RESULTS / "outer_update.png")


if __name__ == "__main__":
    main()
