"""Command-line arguments for the text, the model and its training, and the objects built from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_async_localsgd.demo.argument_types import more_than_zero, whole

# These imports take seconds: `--help` and mistyped arguments should not wait for them.
if TYPE_CHECKING:
    from lightning_async_localsgd.demo.language_model import LanguageModel
    from lightning_async_localsgd.demo.text import TextDataModule

__all__ = ["add_arguments", "build_data", "build_model"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :func:`build_data` and :func:`build_model`."""
    text = parser.add_argument_group("text (default: what ships with Python)")
    source = text.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, metavar="PATH", help="a text file, or a folder of them")
    source.add_argument("--dataset", metavar="NAME", help="a data set of the Hugging Face hub, streamed: allenai/c4")
    text.add_argument("--dataset-config", metavar="CONFIG", help="its configuration: en")
    text.add_argument("--text-column", default="text", metavar="COLUMN", help="its column of text")
    text.add_argument("--vocab-size", type=whole(257), default=1024, help="256 bytes, one end, and what is merged")

    model = parser.add_argument_group("model")
    model.add_argument("--width", type=whole(1), default=128, help="size of the residual stream")
    model.add_argument("--layers", type=whole(1), default=4, help="blocks")
    model.add_argument("--heads", type=whole(1), default=4, help="attention heads per block")
    model.add_argument("--context", type=whole(1), default=128, help="tokens that the model reads at a time")

    training = parser.add_argument_group("training")
    training.add_argument("--batch-size", type=whole(1), default=16, help="per worker")
    training.add_argument("--learning-rate", type=more_than_zero, default=1.5e-3, help="highest, of AdamW")
    training.add_argument("--warmup-steps", type=whole(0), default=40, help="until it is reached")


def build_data(args: argparse.Namespace, folder: Path) -> TextDataModule:
    """The data described by the arguments.

    Args:
        args: Result of a parser with :func:`add_arguments`.
        folder: The folder in which tokenizer and tokens are kept for the next run.
    """
    from lightning_async_localsgd.demo.corpora import Corpus, FileCorpus, HubCorpus, PythonCorpus
    from lightning_async_localsgd.demo.text import TextDataModule

    corpus: Corpus = PythonCorpus()
    if args.text:
        corpus = FileCorpus(args.text)
    elif args.dataset:
        corpus = HubCorpus(args.dataset, args.dataset_config, args.text_column)
    return TextDataModule(corpus, folder, args.vocab_size, args.context, args.batch_size)


def build_model(args: argparse.Namespace) -> LanguageModel:
    """The model described by the arguments, with random parameters.

    Raises:
        ValueError: if the heads do not divide the width.
    """
    from lightning_async_localsgd.demo.gpt import GPT
    from lightning_async_localsgd.demo.language_model import LanguageModel

    gpt = GPT(args.vocab_size, args.context, args.width, args.layers, args.heads)
    return LanguageModel(gpt, args.learning_rate, args.warmup_steps)
