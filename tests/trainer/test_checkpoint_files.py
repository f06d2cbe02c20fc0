"""Files of checkpoints: one is complete only if each file is, and nothing older goes before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_async_localsgd.trainer.checkpoints.files import CheckpointFiles, ShardFiles, find_complete
from lightning_async_localsgd.trainer.checkpoints.writing import BackgroundWriter, FileRecord, write_file


def write_leader(books: CheckpointFiles, path: str) -> str:
    """Begin a checkpoint of two workers with worker 0's file."""
    checkpoint_id = books.begin(path)
    with books.write(path, checkpoint_id) as leader:
        record = write_file({"id": checkpoint_id}, leader)
    books.leader_written(checkpoint_id, record)
    return checkpoint_id


def write_shard(books: CheckpointFiles, shards: ShardFiles, path: str, checkpoint_id: str) -> Path:
    books.shard_written(checkpoint_id, 1, shards.write(path, checkpoint_id, {"x": torch.ones(100)}))
    return Path(f"{path}.workers") / checkpoint_id / "worker-1.pt"


def found(path: str, checkpoint_id: str | None) -> str | None:
    """The id of the checkpoint that a job of two workers goes on from."""
    for complete in find_complete(path, checkpoint_id):
        if not (complete.problem(0) or complete.problem(1)):
            saved: str = torch.load(complete.path, weights_only=True)["id"]
            return saved
    return None


def test_the_older_checkpoint_of_a_name_stays_until_the_newer_one_is_complete(tmp_path: Path) -> None:
    deleted: list[str] = []
    books, shards, path = CheckpointFiles(deleted.append, workers=2), ShardFiles(1), str(tmp_path / "last.ckpt")
    first = write_leader(books, path)
    assert found(path, first) is None
    write_shard(books, shards, path, first)
    assert found(path, first) == first

    second = write_leader(books, path)
    books.remove("replaced.ckpt")
    assert found(path, second) == first and deleted == []
    write_shard(books, shards, path, second)
    assert found(path, second) == second and deleted == ["replaced.ckpt"]
    assert [p.name for p in Path(f"{path}.workers").iterdir()] == [second]


def empty(file: Path) -> None:
    file.write_bytes(b"")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [empty, truncate, flip_a_bit, os.remove])
@pytest.mark.parametrize("name", ["worker-1.pt", "leader.ckpt"])
def test_a_damaged_file_makes_its_checkpoint_incomplete(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    books, shards, path = CheckpointFiles(lambda _: None, workers=2), ShardFiles(1), str(tmp_path / "last.ckpt")
    first = write_leader(books, path)
    write_shard(books, shards, path, first)
    kept = tmp_path / "kept"
    os.renames(f"{path}.workers/{first}", kept)
    second = write_leader(books, path)
    shard = write_shard(books, shards, path, second)
    os.rename(kept, f"{path}.workers/{first}")  # as if it had not been deleted yet
    assert found(path, second) == second
    file = shard if name == "worker-1.pt" else Path(path)
    damage(file)
    assert found(path, second) == first
    damaged = next(w for w in find_complete(path, second) if w.folder.endswith(second))
    assert damaged.problem(int(name == "worker-1.pt")).startswith(str(file))


def test_a_shard_that_is_not_as_it_was_told_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    books, shards, path = CheckpointFiles(lambda _: None, workers=2), ShardFiles(1), str(tmp_path / "last.ckpt")
    first = write_leader(books, path)
    write_shard(books, shards, path, first)
    second = write_leader(books, path)
    record = shards.write(path, second, {"x": torch.ones(100)})
    (Path(f"{path}.workers") / second / "worker-1.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"worker-1.pt has 0 bytes"):
        books.shard_written(second, 1, record)
    assert found(path, second) == first


def test_two_jobs_with_one_name_leave_each_others_sides(tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")
    jobs = [(CheckpointFiles(lambda _: None, workers=2), ShardFiles(1)) for _ in range(2)]
    for books, shards in jobs:
        write_shard(books, shards, path, write_leader(books, path))
    ids = []
    for books, _ in jobs:
        ids.append(write_leader(books, path))
    for (books, shards), checkpoint_id in zip(jobs, ids, strict=True):
        write_shard(books, shards, path, checkpoint_id)
        assert found(path, ids[1]) == checkpoint_id
    assert {p.name for p in Path(f"{path}.workers").iterdir()} == set(ids)


def test_a_new_run_deletes_what_it_found_of_a_name_when_its_own_is_complete(tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")
    before, shards = CheckpointFiles(lambda _: None, workers=2), ShardFiles(1)
    write_shard(before, shards, path, write_leader(before, path))
    write_leader(before, path)  # the job died before the other shard was written
    books, shards = CheckpointFiles(lambda _: None, workers=2), ShardFiles(1)
    own = write_leader(books, path)
    assert len(list(Path(f"{path}.workers").iterdir())) == 3
    write_shard(books, shards, path, own)
    assert [p.name for p in Path(f"{path}.workers").iterdir()] == [own]


def test_old_shards_on_another_host_are_deleted_there(tmp_path: Path) -> None:
    own, other = str(tmp_path / "host0" / "last.ckpt"), str(tmp_path / "host1" / "last.ckpt")
    shards = ShardFiles(1)

    def replaced(path: str, checkpoint_id: str | None) -> None:
        if checkpoint_id is None:
            shards.forget(other)
        else:
            shards.forget_older(other, checkpoint_id)

    books = CheckpointFiles(lambda _: None, workers=2, on_replaced=replaced)
    ids = []
    for _ in range(3):
        ids.append(write_leader(books, own))
        books.shard_written(ids[-1], 1, shards.write(other, ids[-1], {"x": torch.ones(1)}))
        assert [p.name for p in Path(f"{other}.workers").iterdir()] == ids[-1:]
    books.remove(own)
    assert not Path(f"{other}.workers").exists() and not Path(f"{own}.workers").exists()


def test_a_file_is_written_with_its_record(tmp_path: Path) -> None:
    content = {"a": torch.randn(1000), "b": torch.arange(7), "c": ["text", 1.5]}
    record = write_file(content, tmp_path / "file")
    assert record == FileRecord.of(tmp_path / "file") and record.size > 4000
    loaded = torch.load(tmp_path / "file", weights_only=True)
    assert torch.equal(loaded["a"], content["a"]) and loaded["c"] == content["c"]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_fails_in_the_background_is_raised_by_the_next_call() -> None:
    writer = BackgroundWriter()
    writer.submit(int, "no number")
    with pytest.raises(ValueError, match="no number"):
        writer.wait()
    writer.wait()
