"""``async-localsgd simulate``: trains the demo's language model on virtual workers, and reports what became of it."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
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
from lightning_async_localsgd.cli.usage import HelpFormatter, UsageError, one_line, refusals
from lightning_async_localsgd.demo.argument_types import whole
from lightning_async_localsgd.demo.arguments import add_arguments, build_data, build_model

if TYPE_CHECKING:
    from lightning_async_localsgd.demo.language_model import LanguageModel
    from lightning_async_localsgd.demo.text import TextDataModule
    from lightning_async_localsgd.simulation import Device, Network, Simulation
    from lightning_async_localsgd.simulation.result import Evaluation, LossPoint, SimulatedRound, SimulationResult

__all__ = ["add_parser", "run"]

_FILES = ("result.json", "rounds.csv", "losses.csv", "updates.csv", "evaluations.csv")
HELD_OUT_BLOCKS = 512  # that an evaluation reads
_EVALUATE_EVERY = "job steps (local steps over workers) between evaluations; 0: none; not given: a tenth of --max-steps"
DESCRIPTION = f"""
Train a small GPT on any number of virtual workers in one process. Time is virtual: a slow device or network costs no
more time here than a fast one, and the parameters are those that a real run of this timing would have. Without
arguments: the four devices of the paper's toy experiment, {", ".join(map(str, STEP_TIMES))} seconds per step.
"""


# ---- the arguments ---------------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand and its arguments."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "simulate",
        help="train on virtual workers of any speeds and network, and draw what happened",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    job = parser.add_argument_group("run")
    job.add_argument("--max-steps", type=whole(1), default=400, help="local steps per worker, on average")
    job.add_argument("--seed", type=whole(0), default=0, help="of parameters, data and noise")
    job.add_argument("--evaluate-every", type=whole(0), metavar="STEPS", help=_EVALUATE_EVERY)
    job.add_argument("--output-dir", type=Path, default=Path("runs/simulate"), help="result, picture, tokenized text")

    add_workers(parser)
    add_network(parser)
    add_method(parser, local_steps="auto")
    add_arguments(parser)
    # Small, so that a run without arguments takes a minute.
    parser.set_defaults(run=run, width=64, layers=2, context=64, batch_size=8)


def _check_budget(args: argparse.Namespace, workers: int) -> None:
    together = args.max_steps * workers
    if args.local_steps != "auto" and together < args.local_steps:
        raise UsageError(
            f"--max-steps {args.max_steps} is {together} local steps of all {workers} workers together, less than one "
            f"round of the fastest: give at least {math.ceil(args.local_steps / workers)}, or fewer --local-steps than "
            f"{args.local_steps}"
        )


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Simulates what the arguments describe; returns the exit code.

    Raises:
        UsageError: if they describe nothing that can be simulated.
    """
    speeds = read_speeds(args)
    _check_budget(args, len(speeds))
    # A data loader without processes of its own is what a simulation wants.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    with refusals():
        network = read_network(args, len(speeds))
        settings = read_settings(args, len(speeds))
        from lightning_async_localsgd.simulation.report import format_table, write_json

        _warn(settings, len(speeds), args.max_steps)
        model, data = _model_and_data(args)
        progress = _Progress(args.output_dir, args.max_steps * len(speeds))
        simulation = _simulation(args, settings, network, speeds, model, data, progress)
    with _interrupts() as received:
        with progress:
            code = _run(simulation, received)
            result = simulation.result()
            progress.add_updates(result)
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        del arguments["run"]
        write_json(result, args.output_dir / "result.json", finished=code == 0, arguments=arguments)
        missing = _draw(result, args.output_dir / "run.png")
    print(format_table(result))
    if code:
        print("unfinished: the run was interrupted, and this is what there was until then")
    files = [*([] if missing else ["run.png"]), *_FILES]
    print(f"\nwritten to {args.output_dir}: {', '.join(files)}")
    if missing:
        print(missing)
    return code


def _warn(settings: dict[str, Any], workers: int, max_steps: int) -> None:
    """Settings that cannot do anything useful, in a line each."""
    from lightning_async_localsgd.settings import Settings
    from lightning_async_localsgd.settings.advice import SettingsWarning, useless_settings

    for sentence in useless_settings(Settings(**settings), workers, max_steps):
        print(f"async-localsgd: warning: {sentence}", file=sys.stderr)
    warnings.simplefilter("ignore", SettingsWarning)  # the simulation would say so again


def _draw(result: SimulationResult, path: Path) -> str | None:
    """Draws the picture; returns why there is none where matplotlib is not installed."""
    try:
        from lightning_async_localsgd.simulation.picture import draw
    except ImportError as error:
        path.unlink(missing_ok=True)  # it would be that of an earlier run
        return one_line(error)
    draw(result, path)
    return None


def _model_and_data(args: argparse.Namespace) -> tuple[LanguageModel, TextDataModule]:
    import torch

    torch.manual_seed(args.seed)
    model = build_model(args)
    data = build_data(args, args.output_dir / "text")
    args.output_dir.mkdir(parents=True, exist_ok=True)  # what cannot be written is refused before the text is read
    data.prepare_data()
    data.setup("fit")
    if data.corpus.stream() is None and len(data.train_dataloader()) == 0:
        raise ValueError(f"The text has not enough blocks of {args.context} tokens for a batch of {args.batch_size}.")
    return model, data


def _simulation(
    args: argparse.Namespace,
    settings: dict[str, Any],
    network: Network,
    speeds: list[float],
    model: LanguageModel,
    data: TextDataModule,
    progress: _Progress,
) -> Simulation:
    from lightning_async_localsgd.demo.language_model import held_out_metrics
    from lightning_async_localsgd.simulation import ConstantDevice, NoisyDevice, Simulation

    workers: list[Device] = [
        NoisyDevice(speed, args.noise) if args.noise else ConstantDevice(speed) for speed in speeds
    ]
    every = max(1, args.max_steps // 10) if args.evaluate_every is None else args.evaluate_every
    held_out = data.blocks["test"][:HELD_OUT_BLOCKS]["tokens"]
    stream = data.corpus.stream()
    progress.simulation = simulation = Simulation(
        model,
        data if stream is None else lambda rank, size: data.stream_dataloader(stream, rank, size),
        workers,
        args.max_steps,
        evaluate=(lambda _: held_out_metrics(model, held_out)) if every else None,
        evaluate_every=every or None,
        network=network,
        seed=args.seed,
        trainer_options={"gradient_clip_val": 1.0},
        on_round=progress.on_round,
        on_evaluation=progress.on_evaluation,
        **settings,
    )
    return simulation


def _run(simulation: Simulation, received: list[int]) -> int:
    """Runs to the end, or until somebody has had enough; returns the exit code."""
    try:
        simulation.run()
    except KeyboardInterrupt:
        return 128 + (received[0] if received else signal.SIGINT)
    return 0


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end a run, once: what is there is then written undisturbed. Yields the signal that it was."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """Shows a simulation while it runs: a bar on the terminal, and CSV files. Its `simulation` is to be set."""

    simulation: Simulation

    def __init__(self, folder: Path, local_steps: int) -> None:
        self._folder = folder
        self._local_steps = local_steps

    def __enter__(self) -> _Progress:
        # Not before: whatever is refused leaves the files of an earlier run as they are.
        from tqdm import tqdm

        from lightning_async_localsgd.simulation.report import LiveTables

        self._tables = LiveTables(self._folder)
        self._bar = tqdm(total=self._local_steps, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._tables.close()

    def on_round(self, round_: SimulatedRound, loss: LossPoint) -> None:
        from lightning_async_localsgd.simulation.report import format_duration

        self._tables.add([round_, loss])
        seconds, _, version = self.simulation.moment
        self._bar.set_postfix(time=format_duration(seconds), version=version, loss=f"{loss.loss:.3f}", refresh=False)
        self._bar.update(round_.local_steps)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self._tables.add([evaluation])

    def add_updates(self, result: SimulationResult) -> None:
        self._tables.add(result.updates)
