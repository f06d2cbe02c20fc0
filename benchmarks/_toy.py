"""The toy task of Liu et al. 2024: classify a mixture of mixtures of Gaussians.

Every class is a mixture of Gaussians around centres of unit norm, and the classes are mixed. Held-out points are drawn
like the training points, from the same centres. Choices that the paper leaves open: the noise is the standard deviation
of every coordinate, the hidden layer has 128 units, and 8,000 points are held out.
"""

from functools import cache

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import TensorDataset

DIMENSIONS = 512
CLASSES = 4
CENTRES = 8  # of each class
NOISE = 0.5
POINTS = 128_000
HELD_OUT_POINTS = 8_000
HIDDEN = 128
BATCH_SIZE = 32
LOCAL_STEPS = 20
LEARNING_RATE = 2e-4
LOWEST_LEARNING_RATE = 1e-6


class ToyClassifier(L.LightningModule):
    """One hidden layer of ReLUs; AdamW, whose learning rate follows a cosine over ``steps``."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.Sequential(nn.Linear(DIMENSIONS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        points, classes = batch
        return F.cross_entropy(self.layers(points), classes)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps, eta_min=LOWEST_LEARNING_RATE)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def evaluate(module: ToyClassifier) -> dict[str, float]:
    """Mean loss (nats) and accuracy on the held-out points."""
    points, classes = load_points()[1].tensors
    with torch.inference_mode():
        scores = module.layers(points)
        accuracy = (scores.argmax(dim=1) == classes).float().mean()
        return {"loss": F.cross_entropy(scores, classes).item(), "accuracy": accuracy.item()}


def best_possible() -> dict[str, float]:
    """Loss and accuracy of a classifier that knows the centres: an upper bound, except for chance."""
    points, classes = load_points()[1].tensors
    likelihoods = -(torch.cdist(points, _centres()) ** 2) / (2 * NOISE**2)
    scores = likelihoods.view(-1, CLASSES, CENTRES).logsumexp(dim=2)
    accuracy = (scores.argmax(dim=1) == classes).float().mean()
    return {"loss": F.cross_entropy(scores, classes).item(), "accuracy": accuracy.item()}


def _centres() -> Tensor:
    """Shape ``[classes x centres, dimensions]``, class by class."""
    chance = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(CLASSES * CENTRES, DIMENSIONS, generator=chance), dim=1)


@cache
def load_points() -> tuple[TensorDataset, TensorDataset]:
    """Training and held-out points with their classes; always the same."""
    chance = torch.Generator().manual_seed(0)
    centres = _centres()

    def draw(count: int) -> TensorDataset:
        chosen = torch.randint(len(centres), (count,), generator=chance)
        noise = torch.randn(count, DIMENSIONS, generator=chance)
        return TensorDataset(noise.mul_(NOISE).add_(centres[chosen]), chosen // CENTRES)

    return draw(POINTS), draw(HELD_OUT_POINTS)
