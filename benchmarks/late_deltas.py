"""What a long exchange costs in learning: held-out perplexity by the part of a round that an exchange takes.

    python benchmarks/late_deltas.py

Simulated: four equal workers, rounds of H steps, from scratch, the default method, fp32. No step is lost and no round
gets longer. All that changes is the bandwidth, so that a delta comes to the others later; and the number of fragments,
each of which is on its way for a part of that time.
"""

import argparse
import json
import math
import multiprocessing
import os
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from torch.utils.data import DataLoader

from _language import LanguageModel, Task, held_out_loss, load_pretrained, load_tokens
from lightning_async_localsgd import make_method
from lightning_async_localsgd.simulation import Network, simulate
from paper import CACHE, REPOSITORY

WORKERS = 4
SHARES = (0.0, 0.1, 0.2, 0.45, 0.9)
"""Rounds that an exchange of the whole model takes."""
FRAGMENTS = (1, 2, 4)


def perplexity(cache: Path, steps: int, local_steps: int, run: tuple[int, int, float]) -> float:
    """Held-out perplexity of one run, of a seed, a number of fragments and a share of :data:`SHARES`."""
    seed, fragments, share = run
    task = Task(pretrain_steps=0)
    training, held_out = load_tokens(cache, task)
    module = LanguageModel(task, steps)
    module.gpt.load_state_dict(load_pretrained(cache, task, seed))
    delta = 4 * sum(p.numel() for p in module.parameters())
    traffic = 2 * (WORKERS - 1) / WORKERS * delta  # of a turn, each way; a step takes one second
    simulate(
        module,
        DataLoader(training, batch_size=task.batch_size, shuffle=True, drop_last=True),
        [1.0] * WORKERS,
        steps,
        seed=seed,
        local_steps=local_steps,
        fragments=fragments,
        codec="fp32",
        network=Network(bandwidth=traffic / (share * local_steps)) if share else None,
        trainer_options={"gradient_clip_val": 1.0, "accelerator": "cpu"},
        **make_method("dn-growing", WORKERS),
    )
    parameters = {name: value.clone() for name, value in module.gpt.state_dict().items()}
    return math.exp(held_out_loss(module.gpt, parameters, held_out))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="local steps per worker")
    parser.add_argument("--local-steps", type=int, default=15, help="H")
    parser.add_argument("--fragments", nargs="+", type=int, default=list(FRAGMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results/late_deltas.json")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for tokens and initial parameters")
    args = parser.parse_args()
    load_tokens(args.cache, Task())
    for seed in args.seeds:
        load_pretrained(args.cache, Task(pretrain_steps=0), seed)
    runs = list(product(args.seeds, args.fragments, SHARES))
    with multiprocessing.get_context("spawn").Pool(args.jobs, torch.set_num_threads, (1,)) as pool:
        found = dict(
            zip(runs, pool.map(partial(perplexity, args.cache, args.steps, args.local_steps), runs, 1), strict=True)
        )
    print("| fragments | exchange of all, in rounds | perplexity | over one fragment and no time, by seed | mean |")
    print("|---|---|---|---|---|")
    for fragments, share in product(args.fragments, SHARES):
        ratios = [found[seed, fragments, share] / found[seed, args.fragments[0], 0.0] for seed in args.seeds]
        by_seed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        mean = fmean(found[seed, fragments, share] for seed in args.seeds)
        print(f"| {fragments} | {share:g} | {mean:.1f} | {by_seed} | {fmean(ratios):.3f} |")
    rows = [
        {"seed": seed, "fragments": fragments, "share": share, "perplexity": value}
        for (seed, fragments, share), value in found.items()
    ]
    report = {"steps": args.steps, "local_steps": args.local_steps, "workers": WORKERS, "runs": rows}
    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
