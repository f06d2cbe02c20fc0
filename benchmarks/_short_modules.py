"""Six small projects of six kinds, as people write them, with data that is made or ships with packages."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from _language import Task, TokenWindows, load_pretrained, load_tokens, next_token_loss
from _quality_modules import ResNet, draw_characters

CACHE = Path(tempfile.gettempdir()) / "async-localsgd-benchmarks"
_TEST_SEED = 10_000


@dataclass(frozen=True)
class Project:
    """A module, its data, and its metric."""

    make: Callable[[int, int], tuple[L.LightningModule, Dataset[Any]]]
    """From a seed and the steps of the run."""
    judge: Callable[[L.LightningModule], float]
    metric: str
    batch_size: int
    higher_is_better: bool = False
    gradient_clip_val: float | None = None


class _Module(L.LightningModule):
    """A net with a loss and an optimizer; the learning rate falls along a cosine, unless it is constant."""

    def __init__(self, net: nn.Module, learning_rate: float, steps: int, cosine: bool = True) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate
        self.steps = steps
        self.cosine = cosine

    def loss(self, batch: Any) -> Tensor:
        *inputs, target = batch
        return F.mse_loss(self.net(*inputs), target)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        if not self.cosine:
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _root_mean_square_error(data: TensorDataset) -> Callable[[L.LightningModule], float]:
    @torch.inference_mode()
    def judge(module: L.LightningModule) -> float:
        *inputs, target = data.tensors
        return F.mse_loss(module.net(*inputs), target).sqrt().item()

    return judge


# ---- tabular --------------------------------------------------------------------------------------------------------


def _tabular_data(samples: int, seed: int) -> TensorDataset:
    """Friedman's first function of ten columns, five of which do nothing, with noise; scaled to about one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, 10, generator=generator)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = (y + torch.randn(samples, generator=generator) - 14) / 5
    return TensorDataset(x, y.unsqueeze(1))


def _tabular(seed: int, steps: int) -> tuple[L.LightningModule, Dataset[Any]]:
    layers = [nn.Linear(10, 64), nn.LayerNorm(64), nn.ReLU(), nn.Dropout(0.05), nn.Linear(64, 64), nn.ReLU()]
    return _Module(nn.Sequential(*layers, nn.Linear(64, 1)), 2e-3, steps, cosine=False), _tabular_data(20_000, seed)


# ---- a forecaster ---------------------------------------------------------------------------------------------------


def _series(samples: int, seed: int) -> TensorDataset:
    """48 past and 12 coming values of series with two seasons, a trend and noise."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(60.0) + 100 * torch.rand(samples, 1, generator=generator)
    amplitude, phase = torch.rand(samples, 2, generator=generator), 6.28 * torch.rand(samples, 2, generator=generator)
    values = amplitude[:, :1] * torch.sin(6.28 * t / 12 + phase[:, :1])
    values += amplitude[:, 1:] * torch.sin(6.28 * t / 7 + phase[:, 1:])
    values += 0.02 * (torch.rand(samples, 1, generator=generator) - 0.5) * torch.arange(60.0)
    values += 0.1 * torch.randn(values.shape, generator=generator)
    return TensorDataset(values[:, :48], values[:, 48:])


class _Forecaster(nn.Module):
    """A GRU over the past values, and a linear layer for the future ones."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(1, 32, batch_first=True)
        self.head = nn.Linear(32, 12)

    def forward(self, past: Tensor) -> Tensor:
        return self.head(self.gru(past.unsqueeze(-1))[0][:, -1])


class _MeanAbsolute(_Module):
    def loss(self, batch: Any) -> Tensor:
        return F.l1_loss(self.net(batch[0]), batch[1])


def _forecaster(seed: int, steps: int) -> tuple[L.LightningModule, Dataset[Any]]:
    return _MeanAbsolute(_Forecaster(), 3e-3, steps), _series(20_000, seed)


def _judge_forecast(data: TensorDataset) -> Callable[[L.LightningModule], float]:
    @torch.inference_mode()
    def judge(module: L.LightningModule) -> float:
        return F.l1_loss(module.net(data.tensors[0]), data.tensors[1]).item()

    return judge


# ---- graphs ---------------------------------------------------------------------------------------------------------


def _graphs(samples: int, seed: int) -> TensorDataset:
    """Random graphs of 12 nodes of two kinds; the target goes by what neighbours of neighbours are, with noise."""
    generator = torch.Generator().manual_seed(seed)
    edges = (torch.rand(samples, 12, 12, generator=generator) < 0.25).float().triu(1)
    edges = edges + edges.mT
    kinds = F.one_hot(torch.randint(2, (samples, 12), generator=generator), 2).float()
    two_away = (edges @ edges @ kinds)[..., :1] * kinds[..., 1:]
    target = (two_away.sum((1, 2)) / 40 + torch.sqrt(edges.sum((1, 2))) / 5).unsqueeze(1)
    target = (target - target.mean()) / target.std()
    return TensorDataset(kinds, edges, target + 0.3 * torch.randn(target.shape, generator=generator))


class _MessagePassing(nn.Module):
    """Three rounds of messages along edges, then a sum over nodes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.messages = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, kinds: Tensor, edges: Tensor) -> Tensor:
        nodes = self.embed(kinds)
        for message in self.messages:
            nodes = nodes + F.relu(message(torch.cat([nodes, edges @ nodes], -1)))
        return self.head(nodes.sum(1) / 12)


def _graph_network(seed: int, steps: int) -> tuple[L.LightningModule, Dataset[Any]]:
    return _Module(_MessagePassing(), 2e-3, steps), _graphs(10_000, seed)


# ---- images ---------------------------------------------------------------------------------------------------------


def _convolutional(seed: int, steps: int) -> tuple[L.LightningModule, Dataset[Any]]:
    return ResNet(0.05), draw_characters(10_000, seed)


def _judge_images(data: TensorDataset) -> Callable[[L.LightningModule], float]:
    @torch.inference_mode()
    def judge(module: L.LightningModule) -> float:
        training = module.training
        module.eval()
        answers = module.net(data.tensors[0]).argmax(1)
        module.train(training)
        return (answers == data.tensors[1]).float().mean().item()

    return judge


# ---- language -------------------------------------------------------------------------------------------------------

_TASK = Task()


class _Language(_Module):
    """The learning rate rises for a twentieth of the run before it falls."""

    def loss(self, batch: Tensor) -> Tensor:
        return next_token_loss(self.net, batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, self.steps, pct_start=0.05, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _language(seed: int, steps: int) -> tuple[L.LightningModule, Dataset[Any]]:
    return _Language(_TASK.make_gpt(), 1e-3, steps), load_tokens(CACHE, _TASK)[0]


class _Reversed(Dataset[Tensor]):
    """The same text from its end to its beginning: the task of an adapter."""

    def __init__(self, windows: TokenWindows) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Tensor:
        return self._windows[index].flip(0)


class _LowRank(nn.Module):
    """A frozen linear layer with a trainable low-rank one beside it."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def _adapters(seed: int, steps: int) -> tuple[L.LightningModule, Dataset[Any]]:
    gpt = _TASK.make_gpt()
    gpt.load_state_dict(load_pretrained(CACHE, _TASK, seed))
    gpt.requires_grad_(False)
    for module in list(gpt.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.out_features != _TASK.vocab_size:
                setattr(module, name, _LowRank(child, rank=8))
    return _Language(gpt, 5e-3, steps), _Reversed(load_tokens(CACHE, _TASK)[0])


def _judge_language(reverse: bool) -> Callable[[L.LightningModule], float]:
    held_out = load_tokens(CACHE, _TASK)[1]
    windows = torch.stack([held_out[index] for index in range(0, len(held_out), 2)])
    windows = windows.flip(1) if reverse else windows

    @torch.inference_mode()
    def judge(module: L.LightningModule) -> float:
        losses = [next_token_loss(module.net, part).item() * len(part) for part in windows.split(64)]
        return sum(losses) / len(windows)

    return judge


def make_projects() -> dict[str, Project]:
    return {
        "tabular": Project(_tabular, _root_mean_square_error(_tabular_data(4000, _TEST_SEED)), "RMSE", 32),
        "forecaster": Project(_forecaster, _judge_forecast(_series(2000, _TEST_SEED)), "MAE", 32),
        "graphs": Project(_graph_network, _root_mean_square_error(_graphs(2000, _TEST_SEED)), "RMSE", 16),
        "images": Project(_convolutional, _judge_images(draw_characters(3000, _TEST_SEED)), "accuracy", 32, True),
        "language": Project(_language, _judge_language(reverse=False), "loss", 8, gradient_clip_val=1.0),
        "adapters": Project(_adapters, _judge_language(reverse=True), "loss", 8, gradient_clip_val=1.0),
    }
