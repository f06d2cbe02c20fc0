"""A LightningCLI whose strategy and all its settings come from the command line or a file.

python examples/ways_in/cli.py fit --config examples/ways_in/cli.yaml
"""

from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel


def main() -> None:
    cli = LightningCLI(DemoModel, BoringDataModule, save_config_callback=None)
    summary = getattr(cli.trainer.strategy, "summary", None)
    print(f"worker {cli.trainer.global_rank}: digest {summary and summary.digest}", flush=True)


if __name__ == "__main__":
    main()
