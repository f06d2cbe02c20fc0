"""Two ordinary LightningModules and their data, made in code: a ResNet with BatchNorm, and a GAN trained by hand."""

import math
import string
from pathlib import Path
from typing import NamedTuple

import lightning as L
import matplotlib
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CHARACTERS = string.digits + string.ascii_uppercase
MODES = 8
RING_RADIUS = 2.0
MODE_DEVIATION = 0.2

_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono")
_GLYPH_PIXELS = 48
_IMAGE_PIXELS = 16


# ---- images: a ResNet -----------------------------------------------------------------------------------------------


def draw_characters(samples: int, seed: int) -> TensorDataset:
    """Distorted characters on a cluttered ground, and which they are: ``[samples, 1, 16, 16]`` and ``[samples]``.

    The characters are those of the fonts that ship with matplotlib: turned, scaled, sheared, moved, of any contrast,
    over a piece of another character and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    glyphs = _glyphs()
    which = torch.randint(len(CHARACTERS), (samples,), generator=generator)
    other = torch.randint(len(CHARACTERS), (samples,), generator=generator)
    images = _distorted(glyphs, which, 0.25, generator)
    clutter = _distorted(glyphs, other, 1.2, generator)
    contrast = 0.5 + 0.5 * torch.rand(samples, 1, 1, 1, generator=generator)
    noise = 0.12 * torch.randn(images.shape, generator=generator)
    return TensorDataset(contrast * images + 0.3 * clutter * (1 - images) + noise - 0.3, which)


def _glyphs() -> Tensor:
    """Every character in every font, ``[characters, fonts, 48, 48]``, from 0 to 1."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", round(0.7 * _GLYPH_PIXELS)) for name in _FONTS]
    glyphs = torch.empty(len(CHARACTERS), len(fonts), _GLYPH_PIXELS, _GLYPH_PIXELS)
    for i, character in enumerate(CHARACTERS):
        for j, font in enumerate(fonts):
            image = Image.new("L", (_GLYPH_PIXELS, _GLYPH_PIXELS))
            middle = (_GLYPH_PIXELS / 2, _GLYPH_PIXELS / 2)
            ImageDraw.Draw(image).text(middle, character, 255, font, anchor="mm")
            glyphs[i, j] = torch.tensor(list(image.tobytes())).view(_GLYPH_PIXELS, _GLYPH_PIXELS) / 255
    return glyphs


def _distorted(glyphs: Tensor, characters: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    """One image per character, in any font: turned, scaled, sheared, and moved by up to ``shift`` of half its width."""
    samples = len(characters)

    def spread(limit: float) -> Tensor:
        return limit * (2 * torch.rand(samples, generator=generator) - 1)

    fonts = torch.randint(glyphs.shape[1], (samples,), generator=generator)
    angle, shear, scale = spread(0.45), spread(0.3), 1 / (0.95 + spread(0.3))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [cos, shear * cos - sin, spread(shift), sin, shear * sin + cos, spread(shift)]
    maps = torch.stack(rows, 1).view(samples, 2, 3)
    images = []
    for part, chosen in zip(maps.split(1000), torch.arange(samples).split(1000), strict=True):
        grid = F.affine_grid(part, [len(part), 1, 2 * _IMAGE_PIXELS, 2 * _IMAGE_PIXELS], align_corners=False)
        large = F.grid_sample(glyphs[characters[chosen], fonts[chosen]].unsqueeze(1), grid, align_corners=False)
        images.append(F.avg_pool2d(large, 2))
    return torch.cat(images)


class _Residual(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(L.LightningModule):
    """Tells characters apart. SGD with momentum; the learning rate rises for a twentieth of the run, then falls.

    Args:
        learning_rate: the highest.
    """

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            _Residual(16, 16, 1),
            _Residual(16, 32, 2),
            _Residual(32, 64, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, len(CHARACTERS)),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, characters = batch
        return F.cross_entropy(self.net(images), characters)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        done = min(1.0, step / self.trainer.max_steps)
        return min(1.0, 20 * done + 1 / self.trainer.max_steps) * 0.5 * (1 + math.cos(math.pi * done))


class Recognized(NamedTuple):
    """Figures of a classifier on held-out images."""

    accuracy: float
    loss: float


@torch.inference_mode()
def recognize(net: nn.Module, held_out: TensorDataset) -> Recognized:
    """Held-out accuracy and cross-entropy of ``net`` with its running statistics."""
    net.eval()
    images, characters = held_out.tensors
    scores = torch.cat([net(part) for part in images.split(500)])
    accuracy = (scores.argmax(1) == characters).float().mean().item()
    return Recognized(accuracy, F.cross_entropy(scores, characters).item())


# ---- points in the plane: a GAN -------------------------------------------------------------------------------------


def draw_ring(samples: int, seed: int) -> TensorDataset:
    """Points of eight Gaussians on a ring, ``[samples, 2]``."""
    generator = torch.Generator().manual_seed(seed)
    centers = _centers()[torch.randint(MODES, (samples,), generator=generator)]
    return TensorDataset(centers + MODE_DEVIATION * torch.randn(samples, 2, generator=generator))


def _centers() -> Tensor:
    angles = 2 * math.pi / MODES * torch.arange(MODES)
    return RING_RADIUS * torch.stack([angles.cos(), angles.sin()], 1)


def _perceptron(inputs: int, outputs: int, width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, outputs),
    )


class GAN(L.LightningModule):
    """Two small nets, each with its Adam, stepped by hand in every batch: non-saturating loss with an R1 penalty.

    Args:
        learning_rate: of both.
    """

    LATENT = 4
    PENALTY = 0.3

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learning_rate = learning_rate
        self.generator = _perceptron(self.LATENT, 2)
        self.critic = _perceptron(2, 1)

    def on_train_start(self) -> None:
        torch.manual_seed(torch.initial_seed() + self.global_rank)  # each process draws noise of its own

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real = batch[0].requires_grad_()
        for_generator, for_critic = self.optimizers()
        fake = self.generator(torch.randn(len(real), self.LATENT))

        score = self.critic(real)
        (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
        penalty = 0.5 * self.PENALTY * slope.square().sum(1).mean()
        for_critic.zero_grad()
        self.manual_backward(F.softplus(-score).mean() + F.softplus(self.critic(fake.detach())).mean() + penalty)
        for_critic.step()

        for_generator.zero_grad()
        self.manual_backward(F.softplus(-self.critic(fake)).mean())
        for_generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(net.parameters(), lr=self.learning_rate, betas=(0.0, 0.99))
            for net in (self.generator, self.critic)
        ]


class Generated(NamedTuple):
    """How near generated points are to held-out ones."""

    mode_overlap: float
    """Share of the points within three deviations of a mode, of each mode as many as there ought to be; 1 is all."""
    sliced_wasserstein: float


@torch.inference_mode()
def compare(generator: nn.Module, held_out: TensorDataset) -> Generated:
    """Compare the held-out points with as many generated ones."""
    real = held_out.tensors[0]
    fake = generator(torch.randn(len(real), GAN.LATENT, generator=torch.Generator().manual_seed(0)))
    overlap = torch.minimum(_per_mode(real), _per_mode(fake)).sum().item()
    angles = math.pi * torch.arange(32) / 32
    directions = torch.stack([angles.cos(), angles.sin()])
    distance = ((real @ directions).sort(0).values - (fake @ directions).sort(0).values).abs().mean().item()
    return Generated(overlap, distance)


def _per_mode(points: Tensor) -> Tensor:
    """Share of the points that belong to each mode."""
    distances, modes = torch.cdist(points, _centers()).min(1)
    return torch.bincount(modes[distances < 3 * MODE_DEVIATION], minlength=MODES) / len(points)
