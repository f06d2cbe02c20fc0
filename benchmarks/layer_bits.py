"""What a codec with other bits for each layer could save: measured on the deltas of the demo's language model.

    python benchmarks/layer_bits.py                             # 2 layers of width 64
    python benchmarks/layer_bits.py --width 128 --layers 4 --max-steps 300

Deltas are recorded in a simulation of four unequal workers from scratch. Each is written with 2 to 8 bits per element
(as ``int4`` does with 4), layer by layer. The bits of layers that make a delta smallest, with a squared error no larger
than that of 4 bits everywhere, are chosen in the knowledge of that delta: a real codec would have to go by older ones.
Two answers: with whole bits, the best of all choices; and with bits of any fraction, if a bit more divides a layer's
error by four, which is a bound for codecs with any steps between.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lightning_async_localsgd.codecs import E3M0, INT4
from lightning_async_localsgd.codecs.blocks import BLOCK, SCALE_BYTES, filled
from lightning_async_localsgd.demo.arguments import add_arguments, build_data, build_model
from lightning_async_localsgd.outer import Transform
from lightning_async_localsgd.outer.layout import Layout
from lightning_async_localsgd.simulation import simulate

RESULTS = Path(__file__).parent / "results"
SPEEDS = (1.724, 1.333, 0.662, 0.3)
BITS = range(2, 9)
UNIFORM = 4
OF_SCALES = 8 * SCALE_BYTES / BLOCK  # bits per element


class Recorder(Transform):
    """Keeps a copy of every pseudo-gradient, in the order of outer updates."""

    def __init__(self) -> None:
        self.deltas: list[Tensor] = []

    def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Any) -> Tensor:
        self.deltas.append(pseudo_gradient.clone())
        return pseudo_gradient


def squared_error(x: Tensor, bits: int) -> float:
    """Of rounding to equidistant levels, with a scale in bf16 per 128 elements."""
    blocks, top = filled(x), 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(1, keepdim=True).div(top).clamp(min=2.0**-126).bfloat16().float()
    return float((blocks.div(scale).round_().mul_(scale) - blocks).double().square().sum())


def relative_error(codec: INT4 | E3M0, x: Tensor) -> float:
    out = torch.empty_like(x)
    codec.decode(codec.encode(x), out)
    return float((out - x).norm() / x.norm())


def whole_bits(errors: list[dict[int, float]], sizes: list[int]) -> float:
    """The fewest bits per element, on average, with the error of 4 bits everywhere: all choices but dominated ones."""
    budget = sum(error[UNIFORM] for error in errors) * (1 + 1e-9)
    front = [(0, 0.0)]
    for error, size in sorted(zip(errors, sizes, strict=True), key=lambda layer: -layer[1]):
        choices = sorted((spent + b * size, lost + error[b]) for spent, lost in front for b in BITS)
        front, least = [], math.inf
        for spent, lost in choices:
            if lost <= budget and lost < least * (1 - 1e-4):
                front.append((spent, lost))
                least = lost
    return min(spent for spent, _ in front) / sum(sizes)


def fractional_bits(errors: list[dict[int, float]], sizes: list[int]) -> float:
    """As :func:`whole_bits`, if b bits can be any number: then all elements get the same error."""
    numel, total = sum(sizes), sum(error[UNIFORM] for error in errors)
    per_element = [(size / numel, error[UNIFORM] / size) for error, size in zip(errors, sizes, strict=True)]
    mean_log = sum(weight * math.log2(max(error, 1e-38)) for weight, error in per_element)
    return UNIFORM - 0.5 * (math.log2(total / numel) - mean_log)


def record(args: argparse.Namespace) -> tuple[list[Tensor], list[int]]:
    """Pseudo-gradients, and the sizes of the layers in them."""
    torch.manual_seed(args.seed)
    model, recorder = build_model(args), Recorder()
    data = build_data(args, args.text_folder)
    data.prepare_data()
    data.setup("fit")
    sizes = [slot.numel for slot in Layout(model).parameter_slots]
    simulate(
        model,
        data,
        SPEEDS,
        args.max_steps,
        local_steps=50,
        codec="fp32",
        transforms=[recorder],
        seed=args.seed,
        trainer_options={"gradient_clip_val": 1.0},
    )
    return recorder.deltas, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=600, help="local steps per worker, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=2, help="look at every so-manieth delta")
    parser.add_argument("--text-folder", type=Path, default=Path("runs/simulate/text"))
    parser.add_argument("--output", type=Path, default=RESULTS / "layer_bits.json")
    add_arguments(parser)
    parser.set_defaults(width=64, layers=2, context=64, batch_size=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    deltas, sizes = record(args)
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    looked_at = deltas[args.every // 2 :: args.every]
    tables = [[{b: squared_error(x[i:j], b) for b in BITS} for i, j in pairwise(bounds)] for x in looked_at]
    uniform = UNIFORM + OF_SCALES
    row = {"width": args.width, "layers": args.layers, "parameters": bounds[-1], "deltas": len(looked_at)}
    row |= {codec.name: fmean(relative_error(codec, x) for x in looked_at) for codec in (INT4(), E3M0())}
    for name, best in (("whole", whole_bits), ("fractional", fractional_bits)):
        saved = [1 - (best(table, sizes) + OF_SCALES) / uniform for table in tables]  # of the bytes, by delta
        row |= {f"{name}_saved": fmean(saved), f"{name}_saved_at_most": max(saved), f"{name}_saved_last": saved[-1]}
    print(json.dumps(row, indent=2))
    rows = json.loads(args.output.read_text()) if args.output.exists() else []
    others = [r for r in rows if (r["width"], r["layers"]) != (args.width, args.layers)]
    args.output.write_text(json.dumps([*others, row], indent=2) + "\n")


if __name__ == "__main__":
    main()
