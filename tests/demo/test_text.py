"""The text of the examples: its requirements, and its errors if one is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

MISSING = "import sys; sys.modules.update(datasets=None, tokenizers=None)\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", MISSING + code], capture_output=True, text=True, timeout=120)


def test_only_the_text_needs_the_optional_packages_and_says_how_to_install_them() -> None:
    others = ", ".join(
        f"lightning_async_localsgd.demo.{name}" for name in ("gpt", "corpora", "language_model", "arguments")
    )
    outcome = run(f"import {others}\nprint('all')\nimport lightning_async_localsgd.demo.text")
    assert outcome.stdout == "all\n", outcome.stderr
    assert outcome.returncode == 1
    assert "pip install datasets tokenizers" in outcome.stderr


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
