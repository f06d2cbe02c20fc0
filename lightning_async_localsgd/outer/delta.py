"""What a worker sends of a round, and how it takes new global parameters over, in whatever precision it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_async_localsgd.outer.layout import Fragment
from lightning_async_localsgd.outer.state import GlobalState

__all__ = ["Adopter", "Unsendable", "write_delta"]


class Unsendable(NamedTuple):
    """What of a round cannot be sent, for it is not finite, or beyond what the codec can write."""

    buffers: tuple[int, ...] = ()
    """The slots of these are left out of the delta."""
    parameters: tuple[str, ...] = ()
    """For the sake of these the whole delta is dropped."""


@torch.no_grad()
def write_delta(
    state: GlobalState, base: Tensor, snapshot: Tensor, buffers: Tensor, out: Tensor, largest: float
) -> Unsendable:
    """Write the delta of a round. All tensors are flat and fp32; those of the layout have shape ``(layout.numel,)``.

    Args:
        state: the global state.
        base: what the worker held at the start of the round.
        snapshot: what it held at the end.
        buffers: the global buffers of now, at the end of ``state.flat``. Statistics move towards this worker's from
            there, not from where its round began: past both, a variance could become negative.
        out: where to; may be ``base``.
        largest: the largest magnitude that can be sent.
    """
    layout = state.layout
    torch.sub(base, snapshot, out=out)
    torch.sub(buffers, snapshot[layout.parameter_numel :], out=out[layout.parameter_numel :])
    state.clear_holes(out)
    if _fits(out, largest):
        return Unsendable()
    views = layout.views(out)
    misfits = [index for index, view in enumerate(views) if not _fits(view, largest)]
    left_out = tuple(index for index in misfits if index >= layout.parameter_count)
    for index in left_out:
        views[index].zero_()
    return Unsendable(left_out, tuple(layout.slots[index].name for index in misfits if index < layout.parameter_count))


def _fits(tensor: Tensor, largest: float) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.maximum(-low, high) <= largest)  # False for NaN


class Adopter:
    """Moves a module's tensors to new global parameters, and keeps the books of what the module holds.

    The next delta is the difference between what the module held and what it holds. Where its dtype is narrower than
    fp32 (``bf16-true``), it does not hold the global parameters but what they are rounded to: were the delta counted
    from them, each worker would send its rounding as if it had been learned. Where its dtype is wider, the low bits
    that fp32 cannot carry are kept.

    Args:
        layout: the layout of the module, or of a fragment of it.
    """

    def __init__(self, layout: Fragment) -> None:
        self._layout = layout
        dtypes = [getattr(torch, slot.dtype) for slot in layout.parameter_slots]
        # Both by slot, of parameters alone: of buffers an average is taken in any case.
        self._narrow = [i for i, dtype in enumerate(dtypes) if dtype.itemsize < torch.float32.itemsize]
        self._wide = [i for i, dtype in enumerate(dtypes) if dtype.itemsize > torch.float32.itemsize]

    @property
    def rounds(self) -> bool:
        """Whether what the module holds differs from the global parameters that it has adopted."""
        return bool(self._narrow)

    @torch.no_grad()
    def hold(self, tensors: Sequence[Tensor], base: Tensor) -> None:
        """Have ``base``, the global parameters that ``tensors`` were copied from, say what these hold of them."""
        views = self._layout.views(base)
        for i in self._narrow:
            views[i].copy_(tensors[i])

    @torch.no_grad()
    def replace(self, tensors: Sequence[Tensor], base: Tensor, correction: Tensor | None = None) -> None:
        """Take the global parameters over as they are: nothing was learned since.

        Args:
            tensors: of the module, in the order of the slots.
            base: the global parameters and buffers, flat; afterwards, what the module holds of them.
            correction: ``base`` minus what the module holds, flat. None: what it holds is worth nothing.
        """
        views = self._layout.views(base)
        kept = {} if correction is None else {i: tensors[i].clone() for i in self._wide}
        torch._foreach_copy_(list(tensors), views, True)
        for i, tensor in kept.items():
            correction_view = self._layout.views(correction)[i]  # type: ignore[arg-type]
            tensors[i].copy_(tensor.add_(correction_view.to(tensor.device)))
        self.hold(tensors, base)

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor], base: Tensor, correction: Tensor, local: float) -> None:
        r"""Change the correction so that it moves the module to its mean with the global parameters.

        With :math:`\theta` what the module holds, :math:`\theta_g` the global parameters, and :math:`\alpha` the share
        of the former, the correction becomes :math:`(1 - \alpha)(\theta_g - \theta)`.

        Args:
            tensors: of the module, in the order of the slots.
            base: the global parameters and buffers, flat.
            correction: flat, on the module's device; it is overwritten.
            local: from 0 to 1.

        References:
            Douillard et al. 2025, Streaming DiLoCo (arXiv 2501.18512), Equation 3.
        """
        correction.copy_(base)
        views = self._layout.views(correction)
        torch._foreach_sub_(views, [tensor.to(torch.float32) for tensor in tensors])
        correction.mul_(1 - local)

    @torch.no_grad()
    def advance(self, tensors: Sequence[Tensor], base: Tensor, correction: Tensor, left_out: Sequence[int]) -> None:
        """Add the correction to what the module holds, keeping what was learned meanwhile: the next delta counts it.

        Args:
            tensors: of the module, in the order of the slots.
            base: the global parameters and buffers, flat; afterwards, what the module would hold if it had learned
                nothing meanwhile.
            correction: flat, on the module's device.
            left_out: slots of buffers that were left out of the delta; they are taken over as they are.
        """
        views, corrections = self._layout.views(base), self._layout.views(correction)
        exact = [i for i in range(len(tensors)) if i not in self._narrow]
        if exact:
            torch._foreach_add_([tensors[i] for i in exact], [corrections[i] for i in exact])
        for i in left_out:
            tensors[i].copy_(views[i])
        for i in self._narrow:  # one after the other, so that memory does not grow with the model
            before = tensors[i].clone()
            tensors[i].add_(corrections[i])
            rounding = tensors[i].float().sub_(before).sub_(corrections[i])
            views[i].add_(rounding.to(base.device))
