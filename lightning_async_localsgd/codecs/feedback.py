"""Error feedback: what a codec loses of one delta goes into the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_async_localsgd.codecs.base import Codec

__all__ = ["ErrorFeedback"]


_NOTHING = torch.zeros(1)


class ErrorFeedback:
    r"""The residual of a worker: the sum of all errors of encoding that were not sent yet.

    With a codec whose ``error_decay`` is :math:`\beta` and whose rounding (or selection) is :math:`Q`, a delta
    :math:`g` is sent as :math:`s`, and the residual :math:`e` becomes

    .. math::
        m = \beta e + g, \quad s = Q(m), \quad e = m - s

    Nothing is allocated before the first lossy encoding. A codec may take another's place at any time.

    Args:
        numel: length of the flat vector of parameters.
        device: where its chunks are.

    References:
        Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", arXiv 1901.09847,
        Algorithm 2 (:math:`\beta = 1`); Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo",
        arXiv 2508.15706 (:math:`\beta < 1`).
    """

    def __init__(self, numel: int, device: torch.device | str = "cpu") -> None:
        self._numel = numel
        self._device = device
        self.can_undo = False
        """Whether :meth:`undo_turn` may be called, which takes memory for the errors of sums."""
        self._residual: Tensor | None = None
        self._of_turn: list[tuple[int, Tensor]] = []  # parts that hold errors of this turn, and what to put there again

    def begin_turn(self) -> None:
        """Errors from here on belong to another turn."""
        self._of_turn.clear()

    def undo_turn(self) -> None:
        """The turn is abandoned: its errors are void, for the delta, with what was added to it, is sent again."""
        for start, before in reversed(self._of_turn):
            self._part(start, before.numel()).copy_(before)
        self.begin_turn()

    def encode(self, codec: Codec, chunk: Tensor, start: int, out: Tensor | None = None) -> Tensor:
        """Add what the codec keeps of the residual to ``chunk``, in place, encode the sum, and keep the error of it.

        Args:
            codec: encodes and decodes.
            chunk: fp32, shape ``(n,)``, contiguous.
            start: position of ``chunk`` in the flat vector.
            out: see :meth:`Codec.encode`.

        Returns:
            The wire form of the sum.
        """
        if codec.lossless and self._residual is None:
            return codec.encode(chunk, out)
        residual = self._part(start, chunk.numel())
        self._of_turn.append((start, _NOTHING.expand(chunk.numel())))  # what was there is in the chunk from now on
        if codec.error_decay != 1:
            residual.mul_(codec.error_decay)  # not by `alpha` below: a fused multiply-add depends on the processor
        wire = codec.encode(chunk.add_(residual), out)
        if codec.lossless:
            residual.zero_()
        else:
            codec.decode(wire, residual)
            torch.sub(chunk, residual, out=residual)
        return wire

    def keep(self, error: Tensor, start: int) -> None:
        """Add an error that was made elsewhere: that of a sum which this worker encoded for all.

        Args:
            error: fp32, shape ``(n,)``: the sum less its decoded form.
            start: position of ``error`` in the flat vector.
        """
        part = self._part(start, error.numel())
        self._of_turn.append((start, part.clone() if self.can_undo else part))
        part.add_(error)

    def state_dict(self) -> dict[str, Any]:
        """The residual itself, or None if nothing was lost."""
        return {"residual": self._residual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a copy of another's residual.

        Raises:
            ValueError: if it belongs to a vector of another length.
        """
        residual: Tensor | None = state["residual"]
        if residual is not None and residual.shape != (self._numel,):
            raise ValueError(f"A residual of {residual.numel()} elements does not fit {self._numel} parameters.")
        self._residual = None if residual is None else residual.to(self._device, torch.float32, copy=True)

    def _part(self, start: int, numel: int) -> Tensor:
        if self._residual is None:
            self._residual = torch.zeros(self._numel, device=self._device)
        return self._residual[start : start + numel]
