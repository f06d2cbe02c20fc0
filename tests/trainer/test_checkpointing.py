"""Checkpoints of a whole job: resumed exactly, by any number of workers, and complete whenever the job dies."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy, make_method
from lightning_async_localsgd.trainer.checkpoints.files import CompleteCheckpoint, find_complete
from tests.modules import FEATURES, Regression, checkpoints, complete_checkpoints, make_trainer, regression_data, stream
from tests.processes import results, run_processes


class Seeded(Regression):
    """Its batch depends on the rank and the step alone, so that a resumed run meets the batches of the first."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        super().training_step(batch, batch_idx)
        generator = torch.Generator().manual_seed(10_000 * self.trainer.global_rank + self.trainer.global_step)
        x = torch.randn(4, FEATURES, generator=generator)
        return self.loss((x, x.sin().sum(1, keepdim=True)))


def parameters(module: nn.Module) -> list[float]:
    return nn.utils.parameters_to_vector(module.parameters()).tolist()


def fit(rank: int, size: int, max_steps: int, plan: AsyncLocalSGDStrategy, ckpt: str | None, **save: Any) -> Any:
    module = Seeded((0.002, 0.005))
    callback = ModelCheckpoint(filename="{step}", **save)
    trainer = make_trainer(size, plan, max_steps=max_steps, callbacks=[callback], enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, stream(rank), ckpt_path=ckpt)
    told = [str(w.message) for w in caught if "Training goes on from" in str(w.message)]
    return parameters(module), plan.summary, told, trainer.global_step


def lockstep(**settings: Any) -> AsyncLocalSGDStrategy:
    settings |= {"local_steps": 10, "quorum": 2, "pace": "fixed", "overlap": False, "grace_period": 0.0}
    return AsyncLocalSGDStrategy(timeout=timedelta(seconds=30), **settings)


def in_lockstep(rank: int, size: int, folder: str, ckpt: str | None, settings: dict[str, Any] | None = None) -> Any:
    plan = lockstep(**settings or {})
    return fit(rank, size, 60, plan, ckpt, dirpath=folder, every_n_train_steps=23, save_top_k=-1)


@pytest.mark.parametrize(
    ("settings", "version"),
    # Six rounds; of three fragments, two have a rest of the last one.
    [({}, 6), (make_method("sparseloco", 2, density=0.01), 6), ({"fragments": 3, "codec": "int4"}, 6 * 3 + 2)],
    ids=["default", "sparseloco", "fragments"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, settings: dict[str, Any], version: int
) -> None:
    whole = results(run_processes(in_lockstep, 2, 2, str(tmp_path), None, settings))
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["step=23.ckpt", "step=46.ckpt"]
    for name in ("step=23.ckpt", "step=46.ckpt"):
        again = results(run_processes(in_lockstep, 2, 2, str(tmp_path / "again"), str(tmp_path / name), settings))
        for (before, summary, *_), (after, resumed, told, steps) in zip(whole, again, strict=True):
            assert after == before
            assert resumed.digest == summary.digest and resumed.version == summary.version == version
            assert resumed.local_steps == summary.local_steps == (60, 60)
            assert steps == 60 and not told


def last_complete(path: Path) -> CompleteCheckpoint | None:
    """The checkpoint from which a job would resume."""
    checkpoint_id = torch.load(path, weights_only=True)["async_localsgd"]["id"]
    complete = find_complete(str(path), checkpoint_id)
    return next((c for c in complete if not any(c.problem(worker) for worker in range(len(c.files)))), None)


def is_complete(path: Path) -> bool:
    last = last_complete(path)
    return last is not None and last.path == str(path)


def unequal(rank: int, size: int, folder: str, ckpt: str | None, max_steps: int = 60) -> Any:
    plan = AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30))
    return fit(rank, size, max_steps, plan, ckpt, dirpath=folder, every_n_train_steps=12, save_top_k=-1)


def test_unequal_workers_resume_from_their_own_sides(tmp_path: Path) -> None:
    results(run_processes(unequal, 2, 2, str(tmp_path), None))
    last = complete_checkpoints(tmp_path)[-1]
    saved = torch.load(last, weights_only=True)["async_localsgd"]
    shard = torch.load(next(last.with_name(f"{last.name}.workers").glob("*/worker-1.pt")), weights_only=True)
    ends = results(run_processes(unequal, 2, 2, str(tmp_path / "again"), str(last)))
    for values, summary, told, steps in ends:
        assert not told
        assert values == ends[0][0] and summary.digest == ends[0][1].digest
        assert 118 <= summary.total_local_steps <= 122
        assert summary.version > saved["state"]["global"]["version"]
        assert steps in summary.local_steps
    assert ends[1][1].local_steps[1] >= shard["worker"]["local_steps"] > 0


class SaveTwice(L.Callback):
    """Saves two checkpoints after worker 0's twelfth step."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 0 and trainer.global_step == 12:
            trainer.save_checkpoint(f"{self.folder}/first.ckpt")
            trainer.save_checkpoint(f"{self.folder}/second.ckpt")


def twice(rank: int, size: int, folder: str, ckpt: str | None) -> Any:
    module, plan = Seeded((0.002, 0.005)), AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30))
    trainer = make_trainer(size, plan, max_steps=60, callbacks=[SaveTwice(folder)])
    trainer.fit(module, stream(rank), ckpt_path=ckpt)
    return parameters(module), plan.job_steps


def test_a_second_checkpoint_of_a_moment_asks_nobody_again(tmp_path: Path) -> None:
    results(run_processes(twice, 2, 2, str(tmp_path), None))
    shards = [next(tmp_path.glob(f"{name}.ckpt.workers/*/worker-1.pt")) for name in ("first", "second")]
    assert shards[0].samefile(shards[1])
    saved = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("first", "second")]
    entries = [checkpoint["async_localsgd"] for checkpoint in saved]
    assert entries[0]["job_steps"] == entries[1]["job_steps"] and entries[0]["id"] != entries[1]["id"]
    assert all(torch.equal(saved[0]["state_dict"][name], tensor) for name, tensor in saved[1]["state_dict"].items())
    assert is_complete(tmp_path / "second.ckpt")
    ends = results(run_processes(twice, 2, 2, str(tmp_path / "again"), str(tmp_path / "second.ckpt")))
    assert ends[0] == ends[1] and ends[0][1] == 60


class NotingIO(TorchCheckpointIO):
    """Notes which threads have written."""

    def __init__(self) -> None:
        self.threads: set[threading.Thread] = set()

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.threads.add(threading.current_thread())
        super().save_checkpoint(*args, **kwargs)


def in_background(rank: int, size: int, folder: str, ckpt: str | None) -> Any:
    plan, io = AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30)), NotingIO()
    trainer = make_trainer(
        size,
        plan,
        max_steps=80,
        callbacks=[ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=40, save_top_k=-1)],
        enable_checkpointing=True,
        plugins=[AsyncCheckpointIO(io)],
    )
    module = Seeded((0.002, 0.005))
    trainer.fit(module, stream(rank), ckpt_path=ckpt)
    return parameters(module), plan.job_steps, len(io.threads), threading.main_thread() in io.threads


def test_lightnings_background_writing_makes_complete_checkpoints(tmp_path: Path) -> None:
    ends = results(run_processes(in_background, 2, 2, str(tmp_path), None))
    threads, by_training_thread = ends[0][2:]
    assert threads > 0 and not by_training_thread
    first = checkpoints(tmp_path)[0]
    assert is_complete(first)
    again = results(run_processes(in_background, 2, 2, str(tmp_path / "again"), str(first)))
    assert again[0][0] == again[1][0] and again[0][1] == 80


def test_another_number_of_workers_goes_on_from_the_global_state(tmp_path: Path) -> None:
    results(run_processes(unequal, 2, 2, str(tmp_path), None))
    last = complete_checkpoints(tmp_path)[-1]
    saved = torch.load(last, weights_only=True)["async_localsgd"]
    ends = results(run_processes(unequal, 3, 3, str(tmp_path / "again"), str(last)))
    for values, summary, *_ in ends:
        assert values == ends[0][0]
        assert abs(summary.total_local_steps - 3 * (60 - saved["job_steps"])) <= 5
        assert summary.version > saved["state"]["global"]["version"]
    assert "was written by 2 workers, and there are 3 now" in ends[0][2][0]


def test_a_checkpoint_after_the_last_step_holds_the_outer_state(tmp_path: Path) -> None:
    results(run_processes(at_the_end, 2, 2, str(tmp_path), None, 30))
    ends = results(run_processes(at_the_end, 2, 2, str(tmp_path / "again"), str(tmp_path / "last.ckpt"), 60))
    version = torch.load(tmp_path / "last.ckpt", weights_only=True)["async_localsgd"]["state"]["global"]["version"]
    for values, summary in ends:
        assert values == ends[0][0]
        assert abs(summary.total_local_steps - 60) <= 5
        assert summary.version > version > 0


class SaveAtTheEnd(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def at_the_end(rank: int, size: int, folder: str, ckpt: str | None, max_steps: int) -> Any:
    plan = AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30))
    module = Seeded((0.002, 0.005))
    path = f"{folder}/last.ckpt"
    during = ModelCheckpoint(dirpath=folder, filename="last", every_n_train_steps=10, enable_version_counter=False)
    trainer = make_trainer(
        size, plan, max_steps=max_steps, callbacks=[during, SaveAtTheEnd(path)], enable_checkpointing=True
    )
    trainer.fit(module, stream(rank), ckpt_path=ckpt)
    return parameters(module), plan.summary


def epochs(rank: int, size: int, folder: str, ckpt: str | None) -> Any:
    plan = AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30))
    module = Seeded((0.02, 0.001))  # worker 0 is the slow one: the other's epochs are over in its first checkpoint
    save = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(
        size, plan, max_epochs=3, callbacks=[save], enable_checkpointing=True, use_distributed_sampler=False
    )
    trainer.fit(module, DataLoader(regression_data(40), batch_size=4), ckpt_path=ckpt)
    return parameters(module), plan.summary, trainer.current_epoch


def test_a_worker_whose_epochs_were_over_in_the_checkpoint_still_takes_part(tmp_path: Path) -> None:
    results(run_processes(epochs, 2, 2, str(tmp_path), None))
    ends = results(run_processes(epochs, 2, 2, str(tmp_path / "again"), str(tmp_path / "epoch=0.ckpt")))
    for values, summary, epoch in ends:
        assert values == ends[0][0] and summary.digest == ends[0][1].digest
        assert summary.local_steps == (30, 30)
        assert epoch == 3


class Backboned(Regression):
    def __init__(self) -> None:
        super().__init__((0.001, 0.4))  # so slow that worker 0 is epochs ahead on a busy machine, too
        self.backbone = nn.Linear(FEATURES, FEATURES)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def finetuning(rank: int, size: int, folder: str, ckpt: str | None, max_steps: int) -> Any:
    plan = AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30))
    module = Backboned()
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-2)
    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    trainer = make_trainer(size, plan, max_steps=max_steps, callbacks=[thaw, save], enable_checkpointing=True)
    trainer.fit(module, DataLoader(regression_data(64), batch_size=4), ckpt_path=ckpt)
    return parameters(module), plan.summary


def test_workers_that_have_unfrozen_different_layers_resume_each_with_its_own(tmp_path: Path) -> None:
    results(run_processes(finetuning, 2, 2, str(tmp_path), None, 20))
    path = checkpoints(tmp_path)[0]  # worker 0 is in its second epoch, worker 1 in its first
    shard = torch.load(next(tmp_path.glob(f"{path.name}.workers/*/worker-1.pt")), weights_only=True)
    groups = [
        len(state["optimizer_states"][0]["param_groups"])
        for state in (torch.load(path, weights_only=True), shard["checkpoint"])
    ]
    assert groups == [2, 1]
    ends = results(run_processes(finetuning, 2, 2, str(tmp_path / "again"), str(path), 60))
    for values, summary in ends:
        assert values == ends[0][0]
        assert abs(summary.total_local_steps - 120) <= 5


def test_an_incomplete_checkpoint_falls_back_and_says_so(tmp_path: Path) -> None:
    results(run_processes(unequal, 2, 2, str(tmp_path), None))
    last = complete_checkpoints(tmp_path)[-1]
    shutil.rmtree(f"{last}.workers")
    ends = results(run_processes(unequal, 2, 2, str(tmp_path / "again"), str(last)))
    assert "does not have every worker's shard" in ends[0][2][0]
    assert ends[0][0] == ends[1][0]


@pytest.mark.parametrize("name", ["worker-1.pt", "leader.ckpt"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_names_the_file(tmp_path: Path, name: str) -> None:
    results(run_processes(in_lockstep, 2, 2, str(tmp_path), None))
    older, newer = (next(tmp_path.glob(f"step={step}.ckpt.workers/*")) for step in (23, 46))
    os.rename(older, newer.with_name(older.name))  # as if both had had one name
    os.truncate(newer / name, (newer / name).stat().st_size - 100)  # step=46.ckpt is the same file as leader.ckpt
    ends = results(run_processes(in_lockstep, 2, 2, str(tmp_path / "again"), str(tmp_path / "step=46.ckpt")))
    told = "\n".join(ends[0][2])
    assert (name if name != "leader.ckpt" else "step=46.ckpt cannot be read") in told and "the one before it" in told
    assert all(end[0] == ends[0][0] and end[1].local_steps == (60, 60) for end in ends)


def as_written_before(folder: Path) -> None:
    """Put a checkpoint in the form in which version 0.1 wrote it."""
    keys = {"leader.ckpt": "async_localsgd", "worker-1.pt": None}
    for name, key in keys.items():
        content = torch.load(folder / name, weights_only=True)
        shard = content[key] if key else content
        lightning = content if key else content["checkpoint"]
        places = shard.pop("fetches")[0]["loaders"]
        lightning["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [place["division"] for place in places]
        shard["worker"].pop("next_shard")
        if key:
            shard.pop("settings")
            for added in ("optimizer_name", "optimizer_given"):
                shard["state"]["global"].pop(added)
        torch.save(content, folder / name)
    (folder / "manifest.json").write_text('{"workers": 2}')


def leased(rank: int, size: int, folder: str, ckpt: str | None) -> Any:
    module, plan = Regression((0.004, 0.001)), lockstep()
    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=9, save_top_k=-1)
    trainer = make_trainer(size, plan, max_epochs=2, callbacks=[save], enable_checkpointing=True)
    trainer.fit(module, DataLoader(regression_data(96), batch_size=4, shuffle=True), ckpt_path=ckpt)
    return parameters(module), plan.summary, module.seen


def test_checkpoints_of_earlier_versions_are_gone_on_from(tmp_path: Path) -> None:
    first = results(run_processes(leased, 2, 2, str(tmp_path), None))
    path = tmp_path / "step=9.ckpt"
    as_written_before(next(tmp_path.glob("step=9.ckpt.workers/*")))
    path.unlink()
    os.link(next(tmp_path.glob("step=9.ckpt.workers/*/leader.ckpt")), path)
    again = results(run_processes(leased, 2, 2, str(tmp_path / "again"), str(path)))
    for (values, summary, seen), (after, resumed, trained) in zip(first, again, strict=True):
        assert after == values and resumed.digest == summary.digest
        assert 0 < len(trained) < len(seen) and seen[-len(trained) :] == trained


def die_after(folder: Path, complete: int, seconds: float) -> None:
    """Be killed a moment after that many more checkpoints have become complete."""
    before = set(folder.glob("*.workers/*/manifest.json"))
    seen: set[Path] = set()
    while len(seen) < complete:
        seen |= set(folder.glob("*.workers/*/manifest.json")) - before
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def mortal(rank: int, size: int, folder: str, max_steps: int, death: tuple[int, float] | None) -> Any:
    class Killed(Seeded):
        def on_train_start(self) -> None:
            if death is not None:
                threading.Thread(target=die_after, args=(Path(folder), *death), daemon=True).start()

    plan = AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30))
    save = ModelCheckpoint(dirpath=folder, filename="one", every_n_train_steps=4, save_top_k=1, save_last=True)
    trainer = make_trainer(size, plan, max_steps=max_steps, callbacks=[save], enable_checkpointing=True)
    module = Killed((0.001, 0.003))
    trainer.fit(module, stream(rank), ckpt_path="last")
    return parameters(module), plan.job_steps


def steps_of_last_complete(path: Path) -> int:
    last = last_complete(path)
    return 0 if last is None else int(torch.load(last.path, weights_only=True)["async_localsgd"]["job_steps"])


@pytest.mark.timeout(280)
def test_a_job_killed_at_any_moment_resumes_from_its_last_complete_checkpoint(tmp_path: Path) -> None:
    moments = random.Random(3)
    job_steps = [0]
    for _ in range(12):
        death = moments.randint(0, 3), moments.uniform(0.0, 0.05)
        outcomes = run_processes(mortal, 2, 2, str(tmp_path), 1_000_000, death)
        for outcome in outcomes:
            assert outcome.error == "killed" or "PeerLost" in outcome.error
        if (tmp_path / "last.ckpt").exists():
            job_steps.append(steps_of_last_complete(tmp_path / "last.ckpt"))
    assert len(set(job_steps)) > 5
    assert job_steps == sorted(job_steps)
    max_steps = job_steps[-1] + 100
    ends = results(run_processes(mortal, 2, 2, str(tmp_path), max_steps, None))
    for values, steps in ends:
        assert values == ends[0][0]
        assert steps == max_steps


# ---- weights that hooks save -----------------------------------------------------------------------------------------


class Adapter(L.Callback):
    """Saves weights of its choice, as references to the module's parameters; so does many an adapter library."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["whole"] = {k: v.clone() for k, v in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = {n: p.detach() for n, p in pl_module.named_parameters() if n.startswith("net.0")}
        checkpoint["version"] = trainer.strategy.worker.version

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        worker = trainer.strategy.worker
        while worker.local_steps == 10 and worker.summary().version == 0:  # the later checkpoints are to hold updates
            time.sleep(0.001)


def saving_adapters(rank: int, size: int, folder: str) -> None:
    save = ModelCheckpoint(dirpath=folder, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    plan = AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30))
    trainer = make_trainer(size, plan, max_steps=30, callbacks=[save, Adapter()], enable_checkpointing=True)
    trainer.fit(Regression([0.002]), stream(rank))
    assert "save_checkpoint" not in vars(trainer)


def test_what_hooks_save_of_the_module_is_the_global_model(tmp_path: Path) -> None:
    results(run_processes(saving_adapters, 2, 2, str(tmp_path)))
    saved = [torch.load(path, weights_only=False) for path in tmp_path.glob("step=*.ckpt")]
    in_the_run = [s for s in saved if s["version"] > 0 and "state" in s["async_localsgd"]]
    assert in_the_run
    for checkpoint in in_the_run:
        in_the_log = checkpoint["async_localsgd"]["state"]["global"]["tensors"]
        assert len(checkpoint["state_dict"]) == 2
        assert all(torch.equal(tensor, in_the_log[name]) for name, tensor in checkpoint["state_dict"].items())
