"""The module to train: a GPT with its loss, its optimizer and its schedule."""

import math

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics.text import Perplexity

from lightning_async_localsgd.demo.gpt import GPT


class LanguageModel(L.LightningModule):
    """A GPT that learns to predict the next token.

    Args:
        gpt: The network.
        learning_rate: Highest learning rate of AdamW.
        warmup_steps: Steps over which the learning rate rises linearly; from there it follows a cosine.
    """

    LOWEST_LEARNING_RATE = 0.1  # of the highest

    def __init__(self, gpt: GPT, learning_rate: float, warmup_steps: int) -> None:
        super().__init__()
        self.gpt = gpt
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.perplexity = Perplexity()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch["tokens"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        tokens = batch["tokens"]
        self.perplexity(self.gpt(tokens[:, :-1]), tokens[:, 1:])
        self.log("perplexity", self.perplexity)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per token, over blocks `[batch, length + 1]`."""
        return F.cross_entropy(self.gpt(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # Weight decay is for matrices, not for gains and biases.
        matrices = [parameter for parameter in self.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in self.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine to `LOWEST_LEARNING_RATE` at `trainer.max_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.trainer.max_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.LOWEST_LEARNING_RATE + (1 - self.LOWEST_LEARNING_RATE) * cosine


@torch.inference_mode()
def held_out_metrics(model: LanguageModel, blocks: Tensor, batch_size: int = 64) -> dict[str, float]:
    """Mean loss (nats per token) and perplexity of a model, without a trainer.

    Args:
        model: The model.
        blocks: Held-out blocks of tokens, shape ``(blocks, block_size + 1)``.
        batch_size: Blocks that the model reads at a time.
    """
    losses = [model.loss(batch.to(model.device)).item() * len(batch) for batch in blocks.split(batch_size)]
    loss = sum(losses) / len(blocks)
    return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # no overflow in a diverged run
