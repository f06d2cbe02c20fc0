"""Whether the examples end well each time: with other seeds, and with the timing that a busy machine gives them.

    python benchmarks/examples.py --runs 20

Each example is run as its page says, and what it prints in the end is read. It has ended well if that is below a limit
that is far from where it began: half of the loss of an answer that is always 0, or a fifth of the first perplexity.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SIMULATE = [sys.executable, "-m", "lightning_async_localsgd", "simulate"]


@dataclass(frozen=True)
class Example:
    """A command, from a seed and a folder for what it writes, and what it prints in the end."""

    command: Callable[[int, str], list[str]]
    printed: str
    """A regular expression; its last match counts."""
    limit: float


EXAMPLES = {
    "plain_loop.py": Example(  # sums of eight sines: their mean square is 3.46
        lambda seed, folder: [*TORCHRUN, "examples/ways_in/plain_loop.py"], r"global parameters ([\d.]+|nan|inf)", 1.73
    ),
    "simulate": Example(
        lambda seed, folder: [*SIMULATE, "--seed", str(seed), "--output-dir", folder],
        r"perplexity .*-> ([\d.e+]+)",
        206,
    ),
    "simulate, 16 workers": Example(
        lambda seed, folder: [
            *SIMULATE,
            *(["--workers", "16", "--speeds", "2", "1", "1", "0.5", "--noise", "0.2", "--bandwidth", "100"]),
            *("--seed", str(seed), "--output-dir", folder),
        ],
        r"perplexity .*-> ([\d.e+]+)",
        206,
    ),
    "train_lm.py": Example(
        lambda seed, folder: [*TORCHRUN, "examples/train_lm.py", "--seed", str(seed), "--output-dir", folder],
        r"before, ([\d.e+]+) after",
        206,
    ),
}


def run(example: Example, seed: int, folder: str) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    outcome = subprocess.run(
        example.command(seed, folder), cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    found = re.findall(example.printed, outcome.stdout)
    if outcome.returncode or not found:
        print(outcome.stdout[-2000:], outcome.stderr[-2000:], file=sys.stderr)
        return float("nan")
    return float(found[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--examples", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), metavar="NAME")
    parser.add_argument("--runs", type=int, default=20, help="of each, with seeds from 0")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON")
    args = parser.parse_args()
    results = {}
    for name in args.examples:
        with tempfile.TemporaryDirectory() as folder:
            values = [run(EXAMPLES[name], seed, folder) for seed in range(args.runs)]
        well = sum(value < EXAMPLES[name].limit for value in values)
        results[name] = {"values": values, "limit": EXAMPLES[name].limit, "ended_well": well}
        print(f"{name}: {well} of {len(values)} ended well, from {min(values):.4g} to {max(values):.4g}", flush=True)
    path = args.output / "examples.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | results, indent=2) + "\n")


if __name__ == "__main__":
    main()
