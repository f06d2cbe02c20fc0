"""The recipes of ``docs/data.md`` for libraries that stream: workers see disjoint parts, worker 0 validates on all."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader

from tests.modules import FEATURES, Regression, make_trainer
from tests.processes import results, run_processes
from tests.trainer.test_strategy import strategy

SAMPLES, SHARDS = 32, 4


class Recipe(Regression):
    """Keeps the numbers of the samples that it trains on and validates."""

    def __init__(self, folder: Path) -> None:
        super().__init__((0.0, 0.005))
        self.folder = folder
        self.validated: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        x = batch["number"].float().unsqueeze(1).expand(-1, FEATURES) / SAMPLES
        return self.net(x).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += batch["number"].tolist()
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += batch["number"].tolist()
        super().validation_step(batch, batch_idx)


class FromDatasets(Recipe):
    def stream(self) -> Any:
        from datasets import Dataset

        return Dataset.from_dict({"number": list(range(SAMPLES))}).to_iterable_dataset(SHARDS).with_format("torch")

    def train_dataloader(self) -> Any:
        from datasets.distributed import split_dataset_by_node

        trainer = self.trainer
        return DataLoader(split_dataset_by_node(self.stream(), trainer.global_rank, trainer.world_size), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(self.stream(), batch_size=4)


class FromWebDataset(Recipe):
    def loader(self, nodesplitter: Any, **kwargs: Any) -> Any:
        import webdataset as wds

        shards = sorted(map(str, self.folder.glob("*.tar")))
        return DataLoader(wds.WebDataset(shards, nodesplitter=nodesplitter, shardshuffle=False).map(number), **kwargs)

    def train_dataloader(self) -> Any:
        import webdataset as wds

        return self.loader(wds.split_by_node, batch_size=4, num_workers=1, multiprocessing_context="fork")

    def val_dataloader(self) -> Any:
        return self.loader(None, batch_size=4)


def number(sample: dict[str, Any]) -> dict[str, int]:
    return {"number": int(sample["txt"])}


def write_tars(folder: Path) -> None:
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(shard, SAMPLES, SHARDS):
                text = str(index).encode()
                entry = tarfile.TarInfo(f"{index:03}.txt")
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text))


class FromLitData(Recipe):
    def stream(self) -> Any:
        import litdata

        return litdata.StreamingDataset(str(self.folder), shuffle=False)

    def train_dataloader(self) -> Any:
        import litdata

        return litdata.StreamingDataLoader(self.stream(), batch_size=4)

    def val_dataloader(self) -> Any:
        stream = self.stream()
        stream.distributed_env.world_size = 1  # it believes the WORLD_SIZE of torchrun
        return DataLoader(stream, batch_size=4)


def write_chunks(folder: Path) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_size=4)
    for index in range(SAMPLES):
        cache[index] = {"number": index}
    cache.done()
    cache.merge()


def following(rank: int, kind: type[Recipe], folder: Path, launched: bool) -> Any:
    if not launched:  # Lightning's own launcher does not say them
        for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            del os.environ[name]
    module = kind(folder)
    make_trainer(2, strategy(), max_epochs=1, use_distributed_sampler=False).fit(module)
    return module.seen, module.validated


@pytest.mark.parametrize("launched", [True, False], ids=["torchrun", "lightning"])
@pytest.mark.parametrize(
    ("library", "kind", "write"),
    [
        ("datasets", FromDatasets, lambda folder: None),
        ("webdataset", FromWebDataset, write_tars),
        ("litdata", FromLitData, write_chunks),
    ],
)
def test_each_sample_is_trained_once_and_all_are_validated(
    library: str, kind: type[Recipe], write: Any, launched: bool, tmp_path: Path
) -> None:
    pytest.importorskip(library)
    write(tmp_path)
    ends = results(run_processes(following, 2, kind, tmp_path, launched))
    assert sorted(ends[0][0] + ends[1][0]) == list(range(SAMPLES))
    assert set(ends[0][1]) == set(range(SAMPLES)) and ends[1][1] == []
