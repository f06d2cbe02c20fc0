"""The simulator's predictions from 2 to 1,024 workers: time, traffic, memory, staleness. Nothing is measured here.

    python benchmarks/scaling.py            # some minutes on one core
    python benchmarks/scaling.py --quick    # up to 32 workers; writes nothing

A model of 125M parameters; a quarter of the workers makes 0.5 steps per second, a quarter 1, half of them 2. Three
networks, H = 50 in three codecs, and H = 500. Writes scaling.json, scaling.md (the tables of docs/scaling.md) and
scaling.png.
"""

import argparse
import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_async_localsgd.protocol.header import HEADER_BYTES
from lightning_async_localsgd.simulation import Network, plan

RESULTS = Path(__file__).parent / "results"
PARAMETERS = 125_000_000
SPEEDS = (2.0, 2.0, 1.0, 0.5)
WORKERS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
NETWORKS = {
    "10 Gbit/s, 0.1 ms": Network(latency=1e-4, bandwidth=10e9 / 8),
    "1 Gbit/s, 0.5 ms": Network(latency=5e-4, bandwidth=1e9 / 8),
    "100 Mbit/s, 20 ms": Network(latency=2e-2, bandwidth=100e6 / 8),
}
SETTINGS = ((50, "fp32"), (50, "bf16"), (50, "int4"), (500, "fp32"))
COLORS = ("#4477aa", "#66ccee", "#aa3377", "#ee6677")


def predict(workers: int, network: str, local_steps: int, codec: str) -> dict[str, Any]:
    speeds = list(islice(cycle(SPEEDS), workers))
    planned = plan(PARAMETERS, speeds, network=NETWORKS[network], local_steps=local_steps, codec=codec)
    figures = planned.to_json()
    for name in ("sent_per_round", "received_per_round", "exposed_seconds"):  # of each worker: too many to write
        figures[name] = sum(figures[name]) / workers
    return {"network": network, **figures}


def table(rows: list[dict[str, Any]], network: str) -> str:
    """A row per number of workers, as Markdown: the time of an exchange and the local steps that a round really has."""
    lines = [
        f"### {network}",
        "",
        "| workers | " + " | ".join(f"H = {h}, {codec}" for h, codec in SETTINGS) + " |",
        "|---" * (1 + len(SETTINGS)) + "|",
    ]
    for workers in sorted({row["workers"] for row in rows}):
        cells = []
        for local_steps, codec in SETTINGS:
            row = find(rows, workers, network, local_steps, codec)
            cell = f"{duration(row['exchange_seconds'])}, {row['round_steps']:,.0f} steps"
            cells.append(f"**{cell}**" if row["keeps_rounds"] else cell)
        lines.append(f"| {workers:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def totals(rows: list[dict[str, Any]]) -> str:
    """Figures that depend little or not at all on the network."""
    network = next(iter(NETWORKS))
    lines = [
        "### Traffic, memory, staleness",
        "",
        "| workers | sent per worker and round, fp32 | bf16 | host memory per worker | mean staleness "
        "| headers per turn, all workers | utilization, H = 50 | H = 500 |",
        "|---" * 8 + "|",
    ]
    for workers in sorted({row["workers"] for row in rows}):
        wide, narrow = (find(rows, workers, network, 50, codec) for codec in ("fp32", "bf16"))
        long = find(rows, workers, network, 500, "fp32")
        headers = (1 + HEADER_BYTES) * workers * (workers - 1)
        lines.append(
            f"| {workers:,} | {size(wide['bytes_per_round'])} | {size(narrow['bytes_per_round'])} "
            f"| {size(wide['memory'])} | {wide['mean_staleness']:.1f} | {size(headers)} "
            f"| {wide['utilization']:.1%} | {long['utilization']:.1%} |"
        )
    return "\n".join(lines)


def find(rows: list[dict[str, Any]], workers: int, network: str, local_steps: int, codec: str) -> dict[str, Any]:
    wanted = {"workers": workers, "network": network, "local_steps": local_steps, "codec": codec}
    return next(row for row in rows if wanted.items() <= row.items())


def duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The steps that a round really has, over the number of workers: a panel per network."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(NETWORKS), sharey=True)
    workers = sorted({row["workers"] for row in rows})
    for axes, network in zip(panels, NETWORKS, strict=True):
        for (local_steps, codec), color in zip(SETTINGS, COLORS, strict=True):
            steps = [find(rows, k, network, local_steps, codec)["round_steps"] for k in workers]
            style = "-" if local_steps == SETTINGS[0][0] else "--"
            axes.plot(
                workers, steps, style, color=color, marker="o", markersize=3.5, label=f"H = {local_steps}, {codec}"
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_yticks([50, 100, 200, 500], ["50", "100", "200", "500"], minor=False)
        axes.minorticks_off()
        axes.set_xticks(workers[::2], [f"{k:,}" for k in workers[::2]])
        axes.set_title(network, fontsize=11)
        axes.set_xlabel("workers")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("local steps per round, fastest worker")
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle("Rounds get longer than H once an exchange takes longer than a round (prediction, 125M parameters)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 32 workers; writes nothing")
    args = parser.parse_args()
    rows = []
    for workers in WORKERS[:5] if args.quick else WORKERS:
        for network in NETWORKS:
            rows += [predict(workers, network, *setting) for setting in SETTINGS]
        print(f"{workers} workers planned", flush=True)
    text = "\n\n".join([*(table(rows, network) for network in NETWORKS), totals(rows)]) + "\n"
    print(text)
    if not args.quick:
        (RESULTS / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "scaling.md").write_text(text)
        draw(rows, RESULTS / "scaling.png")


if __name__ == "__main__":
    main()
