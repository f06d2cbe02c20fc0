"""Error feedback: what a codec loses of one delta goes into the next one."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_async_localsgd.codecs.base import Codec

__all__ = ["ErrorFeedback"]


class ErrorFeedback:
    """The residual of a worker: errors of all that it has encoded and that its next delta makes up for.

    Nothing is allocated before the first error.

    Args:
        numel: elements of a delta.
        device: device of the residual.

    References:
        Seide et al. 2014, 1-Bit Stochastic Gradient Descent; Karimireddy et al. 2019, Error Feedback Fixes SignSGD
        (arXiv 1901.09847), Algorithm 2.
    """

    def __init__(self, numel: int, device: torch.device | str) -> None:
        self.residual: Tensor | None = None
        """Fp32, shape ``(numel,)``; None while there was no error."""
        self._numel = numel
        self._device = device

    def encode(self, codec: Codec, chunk: Tensor, start: int) -> Tensor:
        """The wire form of a part of a delta and of the residual there, of which the new error remains.

        Args:
            codec: the codec.
            chunk: fp32, shape ``(n,)``. The residual is added to it.
            start: its place in the vector.

        Returns:
            The wire form; may be a view of ``chunk``.
        """
        if codec.lossless and self.residual is None:
            return codec.encode(chunk)
        residual = self._part(start, chunk.numel())
        chunk.add_(residual)
        wire = codec.encode(chunk)
        if codec.lossless:
            residual.zero_()
        else:
            codec.decode(wire, residual)
            torch.sub(chunk, residual, out=residual)
        return wire

    def keep(self, error: Tensor, start: int) -> None:
        """Add an error to the residual: that of a sum that this worker has encoded for all.

        Args:
            error: fp32, shape ``(n,)``.
            start: its place in the vector.
        """
        self._part(start, error.numel()).add_(error)

    def load(self, residual: Tensor | None) -> None:
        """Go on from a saved :attr:`residual`."""
        self.residual = None if residual is None else residual.to(self._device, copy=True)

    def _part(self, start: int, numel: int) -> Tensor:
        if self.residual is None:
            self.residual = torch.zeros(self._numel, device=self._device)
        return self.residual[start : start + numel]
