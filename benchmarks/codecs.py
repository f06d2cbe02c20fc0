"""What codecs cost and lose: GB/s beside a memory copy, bytes per element, relative error.

    python benchmarks/codecs.py [--device cuda]

Speeds count the bytes of the fp32 elements, on one thread. `cached` is a vector that fits into the cache, `streamed`
one that does not. Time is that in which the thread ran, so that a busy machine takes little of it. Each codec takes
turns with the copy, and the best of all turns counts. Errors are norms of the error over the norm of the vector, of
Gaussian elements and of heavy-tailed ones (Student's t with 3 degrees of freedom, and a scale per 512 elements that
differs as exp of a Gaussian).
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_async_localsgd.codecs import Codec, TopK, codecs_by_name

RESULTS = Path(__file__).parent / "results"
SIZES = {"cached": 1 << 18, "streamed": 1 << 23}
"""Elements."""
CODECS = {**codecs_by_name(), "topk, 2 bits": TopK(bits=2)}
WANTED = 1.5  # GB/s


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on the CPU those in which the thread ran."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    begin = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begin


def speeds(codec: Codec, numel: int, device: torch.device, turns: int) -> dict[str, float]:
    """GB/s of a copy, of encoding, of decoding, and of decoding that adds."""
    x = torch.randn(numel, device=device)
    out = torch.empty_like(x)
    wire = torch.empty(codec.wire_bytes(numel), dtype=torch.uint8, device=device)
    functions: dict[str, Callable[[], object]] = {
        "copy": lambda: out.copy_(x),
        "encode": lambda: codec.encode(x, wire),
        "decode": lambda: codec.decode(wire, out),
        "add": lambda: codec.decode(wire, out, add=True),
    }
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(turns):
        for name, function in functions.items():
            best[name] = min(best[name], timed(function, device))
    return {name: 4 * numel / seconds / 1e9 for name, seconds in best.items()}


def heavy_tailed(numel: int) -> Tensor:
    """Elements with rare large ones, in regions of different scale."""
    gaussian = torch.randn(4, numel)
    student = gaussian[0] / (gaussian[1:] ** 2).mean(dim=0).sqrt()
    return student * torch.randn(numel // 512).exp().repeat_interleave(512)


def relative_error(codec: Codec, x: Tensor) -> float:
    out = torch.empty_like(x)
    codec.decode(codec.encode(x), out)
    return float((out - x).norm() / x.norm())


def measure(codec: Codec, device: torch.device, turns: int) -> dict[str, Any]:
    numel = 1 << 20
    torch.manual_seed(0)
    return {
        "codec": repr(codec),
        "bytes_per_element": codec.wire_bytes(numel) / numel,
        "error_gaussian": relative_error(codec, torch.randn(numel)),
        "error_heavy_tailed": relative_error(codec, heavy_tailed(numel)),
        "gigabytes_per_second": {
            name: speeds(codec, size, device, max(5, turns * SIZES["cached"] // size)) for name, size in SIZES.items()
        },
    }


def describe(name: str, row: dict[str, Any]) -> str:
    figures = "; ".join(
        f"{size}: " + ", ".join(f"{what} {value:.2f}" for what, value in found.items())
        for size, found in row["gigabytes_per_second"].items()
    )
    errors = f"error {row['error_gaussian']:.4f} Gaussian, {row['error_heavy_tailed']:.4f} heavy-tailed"
    return f"{name}: {row['bytes_per_element']:.4f} bytes per element, {errors}; GB/s {figures}"


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Speeds as bars, and errors over bytes per element."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, (what, color) in enumerate({"copy": "0.75", "encode": "C0", "decode": "C1", "add": "C2"}.items()):
        values = [row["gigabytes_per_second"]["streamed"][what] for row in rows.values()]
        label = {"copy": "memory copy", "add": "decode and add"}.get(what, what)
        left.bar([x + 0.2 * (i - 1.5) for x in range(len(rows))], values, 0.2, color=color, label=label)
    left.axhline(WANTED, color="black", linewidth=0.8, linestyle="--", label=f"{WANTED} GB/s")
    left.set_xticks(range(len(rows)), list(rows))
    left.set_yscale("log")
    left.set_ylim(0.1, 60)
    left.set_ylabel("GB/s of fp32 elements")
    left.legend(frameon=False, fontsize=9, ncols=2)
    for kind, color in (("gaussian", "C0"), ("heavy_tailed", "C3")):
        lossy = {name: row for name, row in rows.items() if row[f"error_{kind}"]}
        sizes = [row["bytes_per_element"] for row in lossy.values()]
        errors = [row[f"error_{kind}"] for row in lossy.values()]
        right.plot(sizes, errors, "o", color=color, markersize=5, label=kind.replace("_", "-"))
        if kind == "gaussian":
            for name, size, error in zip(lossy, sizes, errors, strict=True):
                right.annotate(name, (size, error), xytext=(0, 7), textcoords="offset points", fontsize=9, rotation=30)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlim(right=4)
    right.set_ylim(top=4)
    right.set_xlabel("bytes per element")
    right.set_ylabel("relative error of one encoding")
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--turns", type=int, default=200, help="how often each codec takes a turn on the small vector")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON and PNG files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, codec in CODECS.items():
        rows[name] = measure(codec, args.device, args.turns)
        print(describe(name, rows[name]), flush=True)
    environment = {"python": platform.python_version(), "torch": torch.__version__, "device": args.device.type}
    report = {"environment": environment, "elements": SIZES, "codecs": rows}
    (args.output / "codecs.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(rows, args.output / "codecs.png")


if __name__ == "__main__":
    main()
