"""A small GPT in plain `torch.nn`: pre-norm blocks, causal attention, the output layer tied to the token embedding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"The width ({width}) must be a multiple of the number of heads ({heads}).")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        return projected


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        mixed: Tensor = x + self.mlp(self.mlp_norm(x))
        return mixed


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.expansion = nn.Linear(width, 4 * width, bias=False)
        self.projection = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.projection(F.gelu(self.expansion(x)))
        return projected


class GPT(nn.Module):
    """Next-token logits for token sequences.

    Args:
        vocab_size: Number of tokens.
        context: Longest sequence that the model can read.
        width: Size of the residual stream.
        layers: Number of blocks.
        heads: Attention heads per block; must divide `width`.
    """

    def __init__(self, vocab_size: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.context = context
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self._initialize(layers)

    def _initialize(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            # Each block adds to the residual stream twice; scaled down, the sum's variance is the same at any depth.
            scale = 1 / math.sqrt(2 * layers) if name.endswith("projection.weight") else 1.0
            nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens `[batch, length]` to logits `[batch, length, vocab_size]`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        return F.linear(self.norm(self.blocks(x)), self.token_embedding.weight)

    @torch.inference_mode()
    def generate(self, prompt: Tensor, new_tokens: int, temperature: float = 0.8, top_k: int = 50) -> Tensor:
        """Continues a prompt `[length]` by `new_tokens` sampled tokens. Returns both in one tensor."""
        tokens = prompt
        for _ in range(new_tokens):
            logits = self(tokens[-self.context :].unsqueeze(0))[0, -1] / temperature
            likeliest = logits.topk(min(top_k, logits.numel()))
            choice = torch.multinomial(likeliest.values.softmax(dim=-1), num_samples=1)
            tokens = torch.cat([tokens, likeliest.indices[choice]])
        return tokens
