"""Delayed Nesterov: momentum moves only every N pseudo-gradients, the gradient part at each."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["GROWTH", "REACH", "STATE_OF_GROUPS", "DelayedNesterov", "default_outer_optimizer"]

GROWTH, REACH = 0.4, 1 / 3
"""Of the default; see docs/cold-start.md for what they were chosen by."""

STATE_OF_GROUPS = ("received", "filled", "round_length")
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

    Only the sum of pseudo-gradients counts between two ends of the buffer. ``step(count=n)`` consumes ``p.grad`` as the
    sum :math:`S` of n pseudo-gradients, none of them beyond the end of the buffer. The result is that of n single steps
    but for rounding:

    .. math::
        \Delta &\leftarrow \Delta + S \\
        \text{if } (t + n) \bmod N = 0: \quad
        m' &= \beta m + \Delta / N, \quad
        \theta \leftarrow \theta - \epsilon \left( (n - 1) c \, \beta m + (1 - cN + c) \, \beta m' + S / N \right), \\
        m &\leftarrow m', \quad \Delta \leftarrow 0 \\
        \text{otherwise:} \quad
        \theta &\leftarrow \theta - \epsilon \left( n c \, \beta m + S / N \right)

    From scratch, directions still turn in the first steps, and a momentum that makes each movement ten times as long
    leads astray; so it does where rounds are so short that workers learn from each other all the time. With ``growth``
    :math:`a` and ``reach`` :math:`b`, the momentum's horizon :math:`1 / (1 - \beta_r)`, in buffers, begins at 1 (none),
    grows by :math:`a` with each buffer that rounds of 50 steps or more have filled, by less with shorter ones in
    proportion (of fewer than 4 steps: as with 4), and stays below :math:`1 + b H`, or :math:`1 + 2 b`:

    .. math::
        \beta_r = \min\left( \beta, 1 - \frac{1}{1 + \min(a r, b \max(2, H))} \right), \quad
        r = \sum_{\text{buffers filled}} \frac{\min(\max(4, H), 50)}{50}

    So it is the local steps made that let the momentum grow, however long the rounds are.

    Args:
        params: parameters to optimize, or dicts of parameter groups.
        lr: outer learning rate :math:`\epsilon`.
        momentum: outer momentum :math:`\beta`, in [0, 1).
        buffer_size: N, pseudo-gradients per momentum update; None: the number of workers, which
            :class:`~lightning_async_localsgd.AsyncLocalSGDStrategy` fills in.
        momentum_activation: c in [0, 1/N], how much of the momentum is already applied between buffer ends.
        growth: how fast the momentum grows, in buffers of horizon per buffer that rounds of 50 steps have filled, more
            than 0; None: it is there from the first, which is Algorithm 3 to the letter and suits pretrained
            parameters.
        reach: how far the momentum may grow, in buffers of horizon per local step of a round (of the fastest worker:
            :meth:`set_round_length` tells), more than 0; None: ``momentum`` alone is the limit.
        whole_turns: whether a buffer ends with the turn that fills it. A sum that reaches beyond its end is then taken
            as a whole, so that the buffer has a few pseudo-gradients more, and no turn needs two sums. False: every
            buffer has N, which is Algorithm 3 to the letter.

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Liu et al. 2024, Asynchronous Local-SGD Training for Language Modeling (arXiv 2401.09135), Algorithm 3. The
        growth is this library's: see docs/cold-start.md.
    """

    left_open: frozenset[int] = frozenset()
    """Parameter groups whose buffer is as long as there are workers."""

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.7,
        momentum: float = 0.9,
        buffer_size: int | None = None,
        momentum_activation: float = 0.0,
        growth: float | None = None,
        reach: float | None = None,
        whole_turns: bool = False,
    ) -> None:
        if lr < 0:
            raise ValueError(f"`lr` must be at least 0, got {lr}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
        for name, value in (("growth", growth), ("reach", reach)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be a number above 0, or None, got {value}.")
        _check_buffer(buffer_size, momentum_activation)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "buffer_size": buffer_size,
            "momentum_activation": momentum_activation,
            "growth": growth,
            "reach": reach,
            "whole_turns": whole_turns,
            "received": 0,  # t of Algorithm 3, modulo N: the pseudo-gradients in the buffer
            "filled": 0.0,  # r: buffers that have been full, those of short rounds for less
            "round_length": None,  # H; None while nobody has told it
        }
        super().__init__(params, defaults)

    def set_default_buffer_size(self, buffer_size: int) -> None:
        """Fill in ``buffer_size`` where it was left to the number of workers.

        Raises:
            ValueError: if ``momentum_activation`` is outside [0, 1/``buffer_size``].
        """
        for i, group in enumerate(self.param_groups):
            if group["buffer_size"] is None:
                _check_buffer(buffer_size, group["momentum_activation"])
                group["buffer_size"] = buffer_size
                self.left_open |= {i}

    def follow_workers(self, buffer_size: int) -> None:
        """Change ``buffer_size`` where it was left to the number of workers, which has changed.

        Raises:
            ValueError: if ``momentum_activation`` is outside [0, 1/``buffer_size``].
        """
        for i in self.left_open:
            group = self.param_groups[i]
            _check_buffer(buffer_size, group["momentum_activation"])
            group["buffer_size"] = buffer_size
            group["received"] %= buffer_size

    def set_round_length(self, local_steps: int) -> None:
        """Tell H, local steps per round of the fastest worker, by which the momentum goes from here on."""
        for group in self.param_groups:
            group["round_length"] = local_steps

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

    @property
    def room(self) -> int:
        """Number of pseudo-gradients that the next sum may have, at least 1.

        They are as many as fit into the buffer, unless it ends with a
        whole turn.

        Raises:
            RuntimeError: if ``buffer_size`` was left open and nobody filled it in.
        """
        return self._room_after(0)

    def sum_sizes(self, count: int) -> list[int]:
        """The sizes of the sums in which :meth:`step` takes the next ``count`` pseudo-gradients, in order.

        Raises:
            RuntimeError: if ``buffer_size`` was left open and nobody filled it in.
        """
        sizes: list[int] = []
        while (left := count - sum(sizes)) > 0:
            sizes.append(min(left, self._room_after(sum(sizes))))
        return sizes

    def _room_after(self, count: int) -> int:
        """The room once ``count`` more pseudo-gradients have been consumed."""
        if any(group["buffer_size"] is None for group in self.param_groups):
            raise RuntimeError("`buffer_size` is None: outside the strategy, pass the number of workers.")
        rooms = [
            sys.maxsize if _ends_with_turn(g) else g["buffer_size"] - (g["received"] + count) % g["buffer_size"]
            for g in self.param_groups
        ]
        return min(rooms)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, count: int = 1
    ) -> float | None:
        """Apply ``p.grad`` of every parameter as one pseudo-gradient, or as a sum. ``p.grad`` is left as it was.

        Args:
            closure: accepted for the sake of the ``Optimizer`` interface; evaluated if given.
            count: number of pseudo-gradients that ``p.grad`` is the sum of, at most :attr:`room`.

        Raises:
            RuntimeError: if ``buffer_size`` was left open and nobody filled it in.
            ValueError: if ``count`` is less than 1 or larger than :attr:`room`.
        """
        if not 1 <= count <= self.room:
            raise ValueError(
                f"`count` must be between 1 and {self.room}, the pseudo-gradients that fit before the end of the "
                f"buffer, got {count}. Split the sum as `sum_sizes` tells."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta = _momentum_of_now(group)
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, count, beta, group)
            received = group["received"] + count
            group["received"] = 0 if received >= group["buffer_size"] else received
            if group["received"] == 0:
                group["filled"] += min(max(_SLOWEST, _round_length(group)) / _FULL, 1.0)
        return loss

    def _update(self, p: Tensor, total: Tensor, count: int, beta: float, group: dict[str, Any]) -> None:
        # Products and sums are separate operations on purpose: a fused multiply-add rounds once where two operations
        # round twice, and whether it is used depends on the processor and on how a loop is split over threads. Replicas
        # on unlike machines must agree to the bit.
        lr, n, c = group["lr"], group["buffer_size"], group["momentum_activation"]
        first, last = group["received"] == 0, group["received"] + count >= n
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
            # Without activation nobody reads the momentum before the buffer is full, so the buffer is gathered in it.
            if c > 0 and n > 1:
                state["buffer"] = torch.zeros_like(p)
        before_end = (count - 1 if last else 0) * c * beta  # of the momentum that the end of the buffer replaces
        activation = (1 - c * n + c if last else count * c) * beta
        for theta, g, m, buffer in _blocks(p, total, state["momentum"], state.get("buffer")):
            update = g.div(n)
            if buffer is None:
                if first:
                    m.mul_(beta)
                m.add_(update)
            else:
                buffer.add_(update)
                if before_end:
                    update.add_(m.mul(before_end))
                if last:
                    m.mul_(beta).add_(buffer)
                    buffer.zero_()
            if activation:
                update.add_(m.mul(activation))
            theta.sub_(update.mul_(lr))


def _ends_with_turn(group: dict[str, Any]) -> bool:
    ends: bool = group.get("whole_turns", False)  # a state of an earlier version does not say
    return ends


# Local steps of a round:
_FULL = 50  # the papers' H; with longer ones the momentum grows no faster
_SLOWEST = 4  # with shorter ones it grows no slower
_SHORTEST = 2  # with shorter ones it reaches as far


def _round_length(group: dict[str, Any]) -> float:
    length: int | None = group["round_length"]
    return math.inf if length is None else length


def _momentum_of_now(group: dict[str, Any]) -> float:
    momentum: float = group["momentum"]
    beyond = math.inf  # the horizon, in buffers, beyond the one that is there without momentum
    if group["growth"] is not None:
        beyond = group["growth"] * group["filled"]
    if group["reach"] is not None:
        beyond = min(beyond, group["reach"] * max(_SHORTEST, _round_length(group)))
    return min(momentum, 1 - 1 / (1 + beyond))


def default_outer_optimizer(params: Iterable[Parameter]) -> DelayedNesterov:
    """The outer optimizer of whoever chooses none: right from the first step of training from scratch."""
    return DelayedNesterov(params, lr=1.0, momentum=0.9, growth=GROWTH, reach=REACH, whole_turns=True)


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
