"""``async-localsgd simulate``: trains the demo's language model on virtual workers, and reports what became of it."""

from __future__ import annotations

import argparse
import math
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.argument_types import at_least, more_than_zero, whole
from lightning_async_localsgd.commands.usage import HelpFormatter, UsageError, one_line, refusals
from lightning_async_localsgd.demo.arguments import add_arguments, build_data, build_model

if TYPE_CHECKING:
    from lightning_async_localsgd.demo.language_model import LanguageModel
    from lightning_async_localsgd.demo.text import TextDataModule
    from lightning_async_localsgd.simulation import Device, Simulation
    from lightning_async_localsgd.simulation.result import Evaluation, LossPoint, SimulatedRound

__all__ = ["add_parser", "run"]

STEP_TIMES = (0.58, 0.75, 1.51, 3.33)  # seconds: the devices of the paper's toy experiment
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

    workers = parser.add_argument_group("workers")
    workers.add_argument("--workers", type=whole(1), metavar="N", help="their number; the speeds are repeated in turn")
    device = workers.add_mutually_exclusive_group()
    device.add_argument("--speeds", type=more_than_zero, nargs="+", metavar="S", help="local steps per second")
    device.add_argument("--step-times", type=more_than_zero, nargs="+", metavar="S", help="seconds per local step")
    workers.add_argument("--noise", type=at_least(0), default=0.0, help="deviation of step times, as a part of them")

    network = parser.add_argument_group("network")
    network.add_argument(
        "--latency", type=at_least(0), default=0.0, metavar="MS", help="of every exchange, in milliseconds"
    )
    network.add_argument("--bandwidth", type=more_than_zero, metavar="MBIT", help="Mbit/s of each worker; no limit")

    method = parser.add_argument_group("method (settings that are not given are the method's)")
    method.add_argument("--method", default="dn", metavar="NAME", help="one of --list-methods")
    method.add_argument("--list-methods", action=_ListMethods, help="show the methods and exit")
    method.add_argument("--local-steps", type=whole(1), default=20, metavar="H", help="per round of the fastest worker")
    method.add_argument("--outer-lr", type=more_than_zero, metavar="LR", help="outer learning rate")
    method.add_argument("--outer-momentum", type=at_least(0), metavar="BETA", help="momentum of the outer optimizer")
    method.add_argument("--pace", metavar="NAME", help="dylu or fixed")
    method.add_argument("--grace-period", type=at_least(0), metavar="SECONDS", help="virtual")
    method.add_argument("--quorum", type=whole(1), metavar="N", help="deltas per outer update")
    method.add_argument("--overlap", action=argparse.BooleanOptionalAction, help="train during an exchange")
    method.add_argument("--codec", metavar="NAME", help="how deltas are sent: fp32, bf16, ...")

    add_arguments(parser)
    # Small, so that a run without arguments takes a minute.
    parser.set_defaults(run=run, width=64, layers=2, context=64, batch_size=8)


class _ListMethods(argparse.Action):
    """Prints the methods and what each does, and exits."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from lightning_async_localsgd.methods import METHODS

        width = max(map(len, METHODS))
        print("\n".join(f"{name.ljust(width)}  {method.description}" for name, method in METHODS.items()))
        parser.exit()


def _speeds(args: argparse.Namespace) -> list[float]:
    given = args.speeds or [1 / seconds for seconds in args.step_times or STEP_TIMES]
    chosen = bool(args.speeds or args.step_times)
    workers = args.workers or len(given)
    if chosen and workers < len(given):
        raise UsageError(f"{len(given)} speeds for --workers {workers}: give at most as many as there are workers")
    return list(islice(cycle(given), workers))


def _check_budget(args: argparse.Namespace, workers: int) -> None:
    together = args.max_steps * workers
    if together < args.local_steps:
        raise UsageError(
            f"--max-steps {args.max_steps} is {together} local steps of all {workers} workers together, less than one "
            f"round of the fastest: give at least {math.ceil(args.local_steps / workers)}, or fewer --local-steps than "
            f"{args.local_steps}"
        )


def _settings(args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """The method's fields of `Settings`, and over them what was given; checked."""
    from lightning_async_localsgd.methods import make_method
    from lightning_async_localsgd.settings import Settings

    fields = make_method(args.method, workers, args.outer_lr, args.outer_momentum, args.pace)
    names = ("local_steps", "grace_period", "quorum", "overlap", "codec")
    fields |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    Settings(**fields).check_workers(workers)
    return fields


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Simulates what the arguments describe; returns the exit code.

    Raises:
        UsageError: if they describe nothing that can be simulated.
    """
    speeds = _speeds(args)
    _check_budget(args, len(speeds))
    # A data loader without processes of its own is what a simulation wants.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    with refusals():
        settings = _settings(args, len(speeds))
        from lightning_async_localsgd.simulation.picture import draw  # refuses to be imported without matplotlib
        from lightning_async_localsgd.simulation.report import format_table, write_csv, write_json

        model, data = _model_and_data(args)
        progress = _Progress(args.output_dir, args.max_steps * len(speeds))
        simulation = _simulation(args, settings, speeds, model, data, progress)
    with progress:
        code = _run(simulation)

    result = simulation.result()
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del arguments["run"]
    write_json(result, args.output_dir / "result.json", finished=code == 0, arguments=arguments)
    write_csv(result, args.output_dir)
    draw(result, args.output_dir / "run.png")
    print(format_table(result))
    if code:
        print("unfinished: the run was interrupted, and this is what there was until then")
    print(f"\nwritten to {args.output_dir}: result.json, run.png, rounds.csv, losses.csv, updates.csv, evaluations.csv")
    return code


def _model_and_data(args: argparse.Namespace) -> tuple[LanguageModel, TextDataModule]:
    import torch

    torch.manual_seed(args.seed)
    model = build_model(args)
    data = build_data(args, args.output_dir / "text")
    data.prepare_data()
    data.setup("fit")
    return model, data


def _simulation(
    args: argparse.Namespace,
    settings: dict[str, Any],
    speeds: list[float],
    model: LanguageModel,
    data: TextDataModule,
    progress: _Progress,
) -> Simulation:
    from lightning_async_localsgd.demo.language_model import held_out_metrics
    from lightning_async_localsgd.simulation import ConstantDevice, Network, NoisyDevice, Simulation

    workers: list[Device] = [
        NoisyDevice(speed, args.noise) if args.noise else ConstantDevice(speed) for speed in speeds
    ]
    bandwidth = math.inf if args.bandwidth is None else args.bandwidth * 1e6 / 8
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
        network=Network(latency=args.latency / 1000, bandwidth=bandwidth),
        seed=args.seed,
        trainer_options={"gradient_clip_val": 1.0},
        on_round=progress.on_round,
        on_evaluation=progress.on_evaluation,
        **settings,
    )
    return simulation


def _run(simulation: Simulation) -> int:
    """Runs to the end, or until somebody has had enough; returns the exit code.

    Raises:
        UsageError: if it is refused only now, with the data at hand.
    """
    with _interrupts() as received:
        try:
            simulation.run()
        except KeyboardInterrupt:
            return 128 + (received[0] if received else signal.SIGINT)
        except ValueError as error:
            _, local_steps, _ = simulation.moment
            if local_steps:
                raise
            raise UsageError(one_line(error)) from error
    return 0


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """SIGTERM ends a run as Ctrl-C does; yields the signals that were it."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before: Callable[[int, FrameType | None], Any] | int | None = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


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
