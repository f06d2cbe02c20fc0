"""The language-modelling task: text that ships with Python, a small GPT, the pretrained start that all runs share."""

import hashlib
import math
import platform
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.utils.data import Dataset

from lightning_async_localsgd.demo.gpt import GPT

HELD_OUT_FRACTION = 0.05  # of the documents
_LOWEST_LEARNING_RATE = 0.1  # of the highest
_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Task:
    """Data, model and inner optimizer: the same for every method."""

    vocab_size: int = 1024
    context: int = 32
    width: int = 64
    layers: int = 2
    heads: int = 4
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    pretrain_steps: int = 1000

    def make_gpt(self) -> GPT:
        return GPT(self.vocab_size, self.context, self.width, self.layers, self.heads)


class TokenWindows(Dataset[Tensor]):
    """Windows of ``context + 1`` tokens: inputs are a window without its last token, targets one without its first."""

    def __init__(self, tokens: Tensor, context: int) -> None:
        self.tokens = tokens
        self.context = context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index * self.context : (index + 1) * self.context + 1]


class LanguageModel(L.LightningModule):
    """Learns to predict the next token; the learning rate rises linearly, then follows a cosine over ``steps``."""

    def __init__(self, task: Task, steps: int) -> None:
        super().__init__()
        self.task = task
        self.steps = steps
        self.gpt = task.make_gpt()

    def training_step(self, windows: Tensor, batch_idx: int) -> Tensor:
        return next_token_loss(self.gpt, windows)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = make_optimizer(self.gpt, self.task)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        warmup = self.task.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, self.steps - warmup))))
        return _LOWEST_LEARNING_RATE + (1 - _LOWEST_LEARNING_RATE) * cosine


def next_token_loss(gpt: GPT, windows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per token, over windows ``[batch, context + 1]``."""
    return F.cross_entropy(gpt(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def make_optimizer(gpt: GPT, task: Task) -> torch.optim.Optimizer:
    return torch.optim.AdamW(gpt.parameters(), lr=task.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


@torch.inference_mode()
def held_out_loss(gpt: GPT, parameters: Mapping[str, Tensor], windows: TokenWindows) -> float:
    """Mean loss of ``gpt`` with these parameters over all of ``windows``."""
    gpt.load_state_dict(dict(parameters))
    stacked = torch.stack([windows[index] for index in range(len(windows))])
    losses = [next_token_loss(gpt, batch).item() * len(batch) for batch in stacked.split(_EVALUATION_BATCH)]
    return sum(losses) / len(windows)


# ---- cached preparations --------------------------------------------------------------------------------------------


def load_tokens(cache: Path, task: Task) -> tuple[TokenWindows, TokenWindows]:
    """Training and held-out windows, which share no document. Made at the first call, then read from a file."""
    path = cache / f"tokens-python{platform.python_version()}-{task.vocab_size}.pt"
    if not path.exists():
        _save(path, _tokenize(task.vocab_size))
    tokens = torch.load(path)
    return TokenWindows(tokens["train"], task.context), TokenWindows(tokens["held_out"], task.context)


def load_pretrained(cache: Path, task: Task, seed: int) -> dict[str, Tensor]:
    """Parameters of the GPT after the common pretraining. Made at the first call, then read from a file."""
    settings = hashlib.sha256(repr((asdict(task), platform.python_version())).encode()).hexdigest()[:12]
    path = cache / f"pretrained-{settings}-seed{seed}.pt"
    if not path.exists():
        _save(path, _pretrain(load_tokens(cache, task)[0], task, seed))
    return torch.load(path)


def _tokenize(vocab_size: int) -> dict[str, Tensor]:
    # Slow to import, and only needed here: the workers read what is stored.
    from lightning_async_localsgd.demo.corpora import PythonCorpus
    from lightning_async_localsgd.demo.text import END_OF_TEXT, train_tokenizer

    documents = [text + END_OF_TEXT for text in PythonCorpus().documents() if text.strip()]
    random.Random(0).shuffle(documents)
    held_out = int(len(documents) * HELD_OUT_FRACTION)
    tokenizer = train_tokenizer(documents[held_out:], vocab_size)

    def encode(texts: list[str]) -> Tensor:
        return torch.tensor([token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids])

    return {"train": encode(documents[held_out:]), "held_out": encode(documents[:held_out])}


def _pretrain(windows: TokenWindows, task: Task, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    gpt = task.make_gpt()
    optimizer = make_optimizer(gpt, task)
    for step in range(task.pretrain_steps):
        batch = torch.stack([windows[index] for index in torch.randint(len(windows), (task.batch_size,)).tolist()])
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate * min(1.0, (step + 1) / task.warmup_steps)
        next_token_loss(gpt, batch).backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return gpt.state_dict()


def _save(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(value, unfinished)
    unfinished.rename(path)  # whole, or not there
