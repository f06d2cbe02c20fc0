"""Delayed Nesterov: momentum moves only every N pseudo-gradients, the gradient part at each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["GROWTH", "STATE_OF_GROUPS", "DelayedNesterov", "default_outer_optimizer"]

GROWTH = 0.4
"""The default's: tuned from scratch, and measured after a pretraining too; see docs/cold-start.md."""

STATE_OF_GROUPS = ("received", "filled")
"""What parameter groups hold beside settings."""


class DelayedNesterov(torch.optim.Optimizer):
    r"""Delayed Nesterov (DN), the outer optimizer of asynchronous Local-SGD.

    :meth:`step` consumes ``p.grad`` as one pseudo-gradient :math:`g_t` (parameters a worker started its round from,
    minus the parameters it ended with). With buffer size :math:`N`, momentum :math:`\beta`, learning rate
    :math:`\epsilon` and momentum activation :math:`c`:

    .. math::
        \Delta &\leftarrow \Delta + g_t \\
        \text{if } (t + 1) \bmod N = 0: \quad
        m &\leftarrow \beta m + \Delta / N, \quad
        \theta \leftarrow \theta - \epsilon \left( (1 - cN + c) \, \beta m + g_t / N \right), \quad
        \Delta \leftarrow 0 \\
        \text{otherwise:} \quad
        \theta &\leftarrow \theta - \epsilon \left( c \, \beta m + g_t / N \right)

    With ``c = 0``, N pseudo-gradients taken from the same :math:`\theta` move it exactly as one
    ``torch.optim.SGD(nesterov=True)`` step on their mean.

    From scratch, directions still turn in the first rounds, and a momentum that adds up ten of them leads astray. With
    ``growth`` :math:`a`, momentum and learning rate begin as those of plain averaging, and become :math:`\beta` and
    :math:`\epsilon` with the buffers filled so far, :math:`r`; the horizon :math:`1 / (1 - \beta_r)` grows by
    :math:`a` with each:

    .. math::
        \beta_r = \min\left( \beta, \frac{a r}{1 + a r} \right), \qquad
        \epsilon_r = 1 + (\epsilon - 1) \, \beta_r / \beta

    Args:
        params: parameters to optimize, or dicts of parameter groups.
        lr: outer learning rate :math:`\epsilon`.
        momentum: outer momentum :math:`\beta`, in [0, 1).
        buffer_size: N, pseudo-gradients per momentum update; None: the number of workers, which
            :class:`~lightning_async_localsgd.AsyncLocalSGDStrategy` fills in.
        momentum_activation: c in [0, 1/N], how much of the momentum is already applied between buffer ends.
        growth: how fast the momentum grows to ``momentum``, in buffers of horizon per buffer filled, more than 0; None:
            it is ``momentum`` from the first, which is Algorithm 3 to the letter and what suits pretrained parameters.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Liu et al. 2024, Asynchronous Local-SGD Training for Language Modeling (arXiv 2401.09135), Algorithm 3. The
        growth is this library's: see docs/cold-start.md.
    """

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.7,
        momentum: float = 0.9,
        buffer_size: int | None = None,
        momentum_activation: float = 0.0,
        growth: float | None = None,
    ) -> None:
        if lr < 0:
            raise ValueError(f"`lr` must be at least 0, got {lr}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
        if growth is not None and not 0 < growth < math.inf:
            raise ValueError(f"`growth` must be a number above 0, or None, got {growth}.")
        _check_buffer(buffer_size, momentum_activation)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "buffer_size": buffer_size,
            "momentum_activation": momentum_activation,
            "growth": growth,
            "received": 0,  # t of Algorithm 3, modulo N: the pseudo-gradients in the buffer
            "filled": 0,  # t of Algorithm 3, over N: buffers that have been full
        }
        super().__init__(params, defaults)

    def set_default_buffer_size(self, buffer_size: int) -> None:
        """Fill in ``buffer_size`` where it was left to the number of workers.

        Raises:
            ValueError: if ``momentum_activation`` is outside [0, 1/``buffer_size``].
        """
        for group in self.param_groups:
            if group["buffer_size"] is None:
                _check_buffer(buffer_size, group["momentum_activation"])
                group["buffer_size"] = buffer_size

    def suit_settings(self) -> None:
        """Make a state that has been loaded one of the settings of now, which may be others than those it is from.

        Raises:
            ValueError: if ``momentum_activation`` is outside [0, 1/``buffer_size``].
        """
        for group in self.param_groups:
            n, c = group["buffer_size"], group["momentum_activation"]
            _check_buffer(n, c)
            group["received"] %= n or 1
            if c > 0 and n != 1:
                for state in filter(None, (self.state[p] for p in group["params"])):
                    if "buffer" not in state:  # what has been gathered in the momentum stays there
                        state["buffer"] = torch.zeros_like(state["momentum"])
                        group["received"] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply ``p.grad`` of every parameter as one pseudo-gradient. ``p.grad`` is left as it was.

        Args:
            closure: accepted for the sake of the ``Optimizer`` interface; evaluated if given.

        Raises:
            RuntimeError: if ``buffer_size`` was left open and nobody filled it in.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["buffer_size"] is None:
                raise RuntimeError("`buffer_size` is None: outside the strategy, pass the number of workers.")
            lr, beta = _in_force(group)
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, lr, beta, group)
            group["received"] = (group["received"] + 1) % group["buffer_size"]
            group["filled"] += group["received"] == 0
        return loss

    def _update(self, p: Tensor, pseudo_gradient: Tensor, lr: float, beta: float, group: dict[str, Any]) -> None:
        # Products and sums are separate operations on purpose: a fused multiply-add rounds once where two operations
        # round twice, and whether it is used depends on the processor and on how a loop is split over threads. Replicas
        # on unlike machines must agree to the bit.
        n, c = group["buffer_size"], group["momentum_activation"]
        first, last = group["received"] == 0, group["received"] == n - 1
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
            # Without activation nobody reads the momentum before the buffer is full, so the buffer is gathered in it.
            if c > 0 and n > 1:
                state["buffer"] = torch.zeros_like(p)
        for theta, g, m, buffer in _blocks(p, pseudo_gradient, state["momentum"], state.get("buffer")):
            update = g.div(n)
            if buffer is None:
                if first:
                    m.mul_(beta)
                m.add_(update)
            else:
                buffer.add_(update)
                if last:
                    m.mul_(beta).add_(buffer)
                    buffer.zero_()
            activation = (1 - c * n + c if last else c) * beta
            if activation:
                update.add_(m.mul(activation))
            theta.sub_(update.mul_(lr))


def _in_force(group: dict[str, Any]) -> tuple[float, float]:
    """Learning rate and momentum of now."""
    lr, momentum, growth = group["lr"], group["momentum"], group["growth"]
    if growth is None or momentum == 0:
        return lr, momentum
    horizon = 1 + growth * group["filled"]  # in buffers
    beta = min(momentum, 1 - 1 / horizon)
    return 1 + (lr - 1) * beta / momentum, beta


def default_outer_optimizer(params: Iterable[Parameter]) -> DelayedNesterov:
    """The outer optimizer of whoever chooses none: right from the first step of training from scratch."""
    return DelayedNesterov(params, lr=0.7, momentum=0.9, growth=GROWTH)


_BLOCK = 1 << 16  # elements: the operands of one block stay in the cache, so that memory is streamed once per step


def _blocks(
    p: Tensor, pseudo_gradient: Tensor, momentum: Tensor, buffer: Tensor | None
) -> Iterable[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    if p.numel() <= _BLOCK or p.device.type != "cpu" or not (p.is_contiguous() and pseudo_gradient.is_contiguous()):
        return [(p, pseudo_gradient, momentum, buffer)]
    n = p.numel()
    flat = [t.view(-1) if t is not None else None for t in (p, pseudo_gradient, momentum, buffer)]
    return (
        tuple(t[i : i + _BLOCK] if t is not None else None for t in flat)  # type: ignore[misc]
        for i in range(0, n, _BLOCK)
    )


def _check_buffer(buffer_size: int | None, momentum_activation: float) -> None:
    if buffer_size is not None and buffer_size < 1:
        raise ValueError(f"`buffer_size` must be at least 1, got {buffer_size}.")
    limit = 1.0 if buffer_size is None else 1 / buffer_size
    if not 0 <= momentum_activation <= limit:
        at_most = "1/buffer_size" if buffer_size is None else f"1/buffer_size = {limit:g}"
        raise ValueError(f"`momentum_activation` must be between 0 and {at_most}, got {momentum_activation}.")
