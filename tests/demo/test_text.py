"""The text of the examples: its requirements, and its errors if one is missing."""

from __future__ import annotations

import re
from pathlib import Path

from tests.imports import run

MISSING = "import sys; sys.modules.update(datasets=None, tokenizers=None)\n"


def test_only_the_text_needs_the_optional_packages_and_says_how_to_install_them() -> None:
    others = ", ".join(
        f"lightning_async_localsgd.demo.{name}" for name in ("gpt", "corpora", "language_model", "arguments")
    )
    code, output = run(f"{MISSING}import {others}\nprint('all', flush=True)\nimport lightning_async_localsgd.demo.text")
    assert output.startswith("all\n"), output
    assert code == 1
    assert "pip install datasets tokenizers" in output


def test_a_file_makes_blocks_to_train_on_and_others_to_test_on(tmp_path: Path) -> None:
    from lightning_async_localsgd.demo.corpora import FileCorpus
    from lightning_async_localsgd.demo.text import TextDataModule

    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of a text that is long enough" for n in range(2_000)))
    data = TextDataModule(FileCorpus(tmp_path / "text.txt"), tmp_path, vocab_size=300, block_size=16, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))["tokens"]
    assert batch.shape == (4, 17) and batch.max() < 300
    tokens = (data.blocks[name][:]["tokens"][:, :-1].flatten().tolist() for name in ("train", "test"))
    trained_on, tested_on = (set(re.findall(r"line (\d+) of", data.tokenizer.decode(each))) for each in tokens)
    assert len(trained_on) > len(tested_on) > 50 and not trained_on & tested_on
