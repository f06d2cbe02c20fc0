"""Sources of documents: the running Python itself, a local path, or a data set of the Hugging Face hub."""

from __future__ import annotations

import platform
import random
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import accumulate, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from datasets import IterableDataset


class Corpus(Protocol):
    """Documents to learn from.

    Attributes:
        key: Changes when the documents do; a key for caches of derived data.
    """

    key: str

    def documents(self) -> Iterable[str]:
        """Yields the documents for the tokenizer and the held-out set and, if there is no stream, for training."""
        ...

    def stream(self) -> IterableDataset | None:
        """Returns more documents, in a column `text`, to train on without storing them; None if there are none."""
        ...


class PythonCorpus:
    """Prose and code that ship with every CPython: its language reference and the sources of its standard library.

    Args:
        max_characters: Size of the corpus; tokenizing more would take longer than the example should.
    """

    # `pydoc_data` is the reference once more, and documents must not be in both training and held-out set;
    # `encodings` is tables of code points, not text.
    SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "pydoc_data", "encodings"})

    def __init__(self, max_characters: int = 5_000_000) -> None:
        self.max_characters = max_characters
        self.key = f"python-{platform.python_version()}-{max_characters}"

    def documents(self) -> Iterator[str]:
        documents = [*self._reference(), *self._sources()]
        # A fixed shuffle, so that the corpus is a sample of the whole library rather than its first letters.
        random.Random(0).shuffle(documents)
        sizes = accumulate(map(len, documents))
        fitting = sum(1 for _ in takewhile(lambda size: size <= self.max_characters, sizes))
        yield from documents[:fitting]

    def stream(self) -> None:
        return None

    @staticmethod
    def _reference() -> list[str]:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]

    @classmethod
    def _sources(cls) -> list[str]:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
        kept = [path for path in paths if cls.SKIPPED_FOLDERS.isdisjoint(path.parts)]
        return [(root / path).read_text(encoding="utf-8", errors="ignore") for path in kept]


class FileCorpus:
    """A text file, or every file of a folder and its subfolders, cut into passages.

    Args:
        path: The file or folder.
        passage_characters: Files are cut at line ends into passages of about this size, so that a single long file too
            can be divided into a training and a held-out set.
    """

    def __init__(self, path: Path, passage_characters: int = 10_000) -> None:
        self.paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if not self.paths:
            raise FileNotFoundError(f"There is no file in {path}.")
        self.passage_characters = passage_characters
        stats = [p.stat() for p in self.paths]
        self.key = f"{path.resolve()}-{[(stat.st_size, stat.st_mtime_ns) for stat in stats]}-{passage_characters}"

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            with path.open(encoding="utf-8", errors="ignore") as lines:
                # `readlines` with a size hint stops at the first line end past that many characters.
                while passage := "".join(lines.readlines(self.passage_characters)):
                    yield passage

    def stream(self) -> None:
        return None


class HubCorpus:
    """A data set of the Hugging Face hub, or a local folder in one of its formats, read as a stream.

    Args:
        name: Name on the hub, such as `allenai/c4`.
        config: Configuration of the data set, such as `en`.
        column: The column that holds the text.
        stored_documents: The first documents, which make the tokenizer and the held-out set; training streams the rest.
    """

    def __init__(self, name: str, config: str | None, column: str, stored_documents: int = 2_000) -> None:
        self.name = name
        self.config = config
        self.column = column
        self.stored_documents = stored_documents
        self.key = f"{name}-{config}-{column}-{stored_documents}"

    def documents(self) -> Iterator[str]:
        return (row["text"] for row in self._rows().take(self.stored_documents))

    def stream(self) -> IterableDataset:
        return self._rows().skip(self.stored_documents)

    def _rows(self) -> IterableDataset:
        from datasets import load_dataset  # only here: the other corpora do not need it

        rows = load_dataset(self.name, self.config, split="train", streaming=True).select_columns(self.column)
        return rows if self.column == "text" else rows.rename_column(self.column, "text")
