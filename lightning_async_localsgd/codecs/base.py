"""What a codec is, and the codecs by name."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Codec", "codecs_by_name", "make_codec"]


class Codec(Protocol):
    """Writes chunks of a delta as bytes on the wire and reads them back.

    Every worker, the sender included, applies ``decode(encode(delta))``, so that all apply the same numbers.
    """

    name: str
    wire_dtype: torch.dtype
    largest: float
    """The largest magnitude that survives the wire; a delta beyond it counts as non-finite."""

    def encode(self, chunk: Tensor) -> Tensor:
        """The wire form of ``chunk`` (fp32, shape ``(n,)``), in ``wire_dtype``, same shape. May be ``chunk`` itself."""

    def decode(self, wire: Tensor) -> Tensor:
        """The fp32 form of ``wire`` (shape ``(n,)``). May be ``wire`` itself."""


def codecs_by_name() -> dict[str, Codec]:
    """All codecs that have a name."""
    from lightning_async_localsgd.codecs.floats import BF16, FP32

    return {codec.name: codec for codec in (FP32(), BF16())}


def make_codec(codec: str | Codec) -> Codec:
    """The codec of this name, or the codec object itself.

    Raises:
        ValueError: if ``codec`` is neither a known name nor an object with ``encode`` and ``decode``.
    """
    known = codecs_by_name()
    if isinstance(codec, str):
        if codec in known:
            return known[codec]
    elif callable(getattr(codec, "encode", None)) and callable(getattr(codec, "decode", None)):
        return codec
    raise ValueError(f"`codec` must be one of {sorted(known)} or an object with `encode` and `decode`, got {codec!r}.")
