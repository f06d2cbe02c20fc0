"""From documents to batches: a byte-level BPE, and blocks of tokens of one length."""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from lightning_async_localsgd.demo.corpora import Corpus

try:
    from datasets import Dataset, DatasetDict, IterableDataset, disable_progress_bars, load_from_disk
    from datasets.distributed import split_dataset_by_node
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as error:
    raise ImportError(
        f"The text needs a package that is not installed ({error.name}): pip install datasets tokenizers"
    ) from error

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


class BlockPacker:
    """Maps a batch of documents, joined end to end, to blocks of `block_size + 1` tokens.

    Inputs are a block without its last token, targets a block without its first. The remainder at the end of the batch
    is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, block_size: int) -> None:
        self.tokenizer = tokenizer
        self.block_size = block_size

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ended = [text + END_OF_TEXT for text in batch["text"]]
        tokens = [token for encoding in self.tokenizer.encode_batch(ended) for token in encoding.ids]
        starts = range(0, len(tokens) - self.block_size, self.block_size)
        return {"tokens": [tokens[start : start + self.block_size + 1] for start in starts]}


class TextDataModule(L.LightningDataModule):
    """Blocks of tokens to train on, and blocks of other documents to test on.

    One process tokenizes and stores the blocks, the others load them. A corpus with a stream trains on that instead,
    tokenized as it arrives.

    Args:
        corpus: The documents.
        folder: The folder in which tokenizer and blocks are kept for the next run.
        vocab_size: Number of tokens of the BPE.
        block_size: Tokens that the model reads at a time.
        batch_size: Blocks per batch.
    """

    HELD_OUT_FRACTION = 0.05

    tokenizer: Tokenizer

    def __init__(self, corpus: Corpus, folder: Path, vocab_size: int, block_size: int, batch_size: int) -> None:
        super().__init__()
        self.corpus = corpus
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.batch_size = batch_size
        settings = repr((corpus.key, vocab_size, block_size, self.HELD_OUT_FRACTION))
        self.folder = folder / hashlib.sha256(settings.encode()).hexdigest()[:16]

    def prepare_data(self) -> None:
        if self.folder.exists():
            return
        disable_progress_bars()
        documents = self._split_documents()
        tokenizer = train_tokenizer(documents["train"]["text"], self.vocab_size)
        blocks = documents.map(BlockPacker(tokenizer, self.block_size), batched=True, remove_columns="text")
        if not blocks["train"].num_rows or not blocks["test"].num_rows:
            raise ValueError(f"The corpus is too small for blocks of {self.block_size} tokens.")
        self._store(tokenizer, blocks)

    def _split_documents(self) -> DatasetDict:
        """Splits by document: blocks of one document in both sets would make the held-out perplexity too good."""
        documents = Dataset.from_dict({"text": [text for text in self.corpus.documents() if text.strip()]})
        if len(documents) < 2:
            raise ValueError("The corpus needs two documents at least, one of them to be held out.")
        return documents.train_test_split(test_size=max(1, int(len(documents) * self.HELD_OUT_FRACTION)), seed=0)

    def _store(self, tokenizer: Tokenizer, blocks: DatasetDict) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.folder.parent) as temporary:
            unfinished = Path(temporary, "data")
            blocks.save_to_disk(unfinished)
            tokenizer.save(str(unfinished / "tokenizer.json"))
            # Renamed when complete, so that an interrupted run leaves no partial data set for the next one.
            unfinished.rename(self.folder)

    def setup(self, stage: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.blocks = load_from_disk(self.folder).with_format("torch")

    def train_dataloader(self) -> DataLoader[Any]:
        stream = self.corpus.stream()
        if stream is None:
            # Lightning, or the strategy, adds a sampler that gives each worker its own part.
            return DataLoader(self.blocks["train"], batch_size=self.batch_size, shuffle=True, drop_last=True)
        # A sampler needs the number of samples: the user has to divide a stream.
        assert self.trainer is not None
        return self.stream_dataloader(stream, self.trainer.global_rank, self.trainer.world_size)

    def stream_dataloader(self, stream: IterableDataset, rank: int, world_size: int) -> DataLoader[Any]:
        """Batches of one process's share of a corpus's stream."""
        shard = split_dataset_by_node(stream, rank=rank, world_size=world_size)
        packer = BlockPacker(self.tokenizer, self.block_size)
        packed = shard.map(packer, batched=True, batch_size=100, remove_columns="text")
        # Neighbouring blocks are of one document: shuffled, a batch holds many.
        shuffled = packed.shuffle(seed=0, buffer_size=1_000)
        return DataLoader(shuffled.with_format("torch"), batch_size=self.batch_size, drop_last=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.blocks["test"], batch_size=self.batch_size)
