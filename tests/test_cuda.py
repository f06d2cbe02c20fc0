"""Two workers that share one GPU: precision, buffers, validation and checkpoints. Skipped where there is none."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.modules import FEATURES, Regression, complete_checkpoints, regression_data, stream
from tests.processes import results, run_processes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ACCELERATOR = "cuda"


class Normalized(Regression):
    """With BatchNorm; notes the type that its net computes in."""

    def __init__(self) -> None:
        super().__init__((0.002, 0.008))
        self.norm = nn.BatchNorm1d(FEATURES)
        self.computed_in: set[str] = set()

    def loss(self, batch: Any) -> Tensor:
        output = self.net(self.norm(batch[0].to(self.norm.weight.dtype)))
        self.computed_in.add(str(output.dtype).removeprefix("torch."))
        return nn.functional.mse_loss(output.float(), batch[1].float())


class OwnTensors(L.Callback):
    """Whether validation on the global parameters has left the worker's own as they were."""

    def __init__(self) -> None:
        self.kept = True
        self.before: list[Tensor] = []
        self.validated = 0
        self.on_device = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_device = all(p.device.type == ACCELERATOR for p in pl_module.parameters())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.before = [t.detach().clone() for t in pl_module.state_dict().values()]

    def on_save_checkpoint(self, *args: Any) -> None:
        self.before = []  # new global parameters may come with it

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated += bool(self.before)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self.before:
            now = list(pl_module.state_dict().values())
            self.kept &= all(torch.equal(a, b) for a, b in zip(self.before, now, strict=True))


def fit(rank: int, size: int, folder: str, ckpt: str | None, precision: Any, outer_device: str) -> Any:
    # Each process is a node of its own to Lightning, so that both may have the one GPU that there is.
    os.environ.update(LOCAL_RANK="0", GROUP_RANK=str(rank), LOCAL_WORLD_SIZE="1")
    module, own = Normalized(), OwnTensors()
    plan = AsyncLocalSGDStrategy(local_steps=5, outer_device=outer_device, timeout=timedelta(seconds=60))
    trainer = L.Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        num_nodes=size,
        strategy=plan,
        precision=precision,
        max_steps=60,
        val_check_interval=10,
        check_val_every_n_epoch=None,
        callbacks=[own, ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=7, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, stream(rank), DataLoader(regression_data(20), batch_size=4), ckpt_path=ckpt)
    state = torch.cat([t.double().cpu().flatten() for t in module.state_dict().values()]).tolist()
    val_loss = float(trainer.callback_metrics.get("val_loss", 0.0))
    assert own.validated > 0 or rank > 0 or ckpt
    return plan.summary, state, own.kept, module.computed_in, own.on_device, val_loss


PRECISIONS = {
    "32-true": "float32",
    "16-mixed": "float16",
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "64-true": "float64",
}


@pytest.mark.parametrize("outer_device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_workers_share_a_gpu(tmp_path: Path, precision: str, outer_device: str) -> None:
    ends = results(run_processes(fit, 2, 2, str(tmp_path), None, precision, outer_device, timeout=150))
    for summary, state, kept, computed_in, on_device, val_loss in ends:
        assert summary.digest == ends[0][0].digest and summary.version > 0
        assert state == ends[0][1] and torch.tensor(state).isfinite().all()
        assert kept, "validation has changed the worker's own parameters"
        assert on_device
        assert PRECISIONS[precision] in computed_in
        assert val_loss == pytest.approx(ends[0][-1]) and val_loss > 0
    assert abs(ends[0][0].total_local_steps - 120) <= 5
    last = complete_checkpoints(tmp_path)[-1]
    again = results(run_processes(fit, 2, 2, f"{tmp_path}/again", str(last), precision, outer_device, timeout=150))
    assert again[0][1] == again[1][1] and torch.tensor(again[0][1]).isfinite().all()
    assert abs(again[0][0].total_local_steps - 120) <= 5
