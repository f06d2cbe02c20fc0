"""Transformations of the pseudo-gradient, chained before the outer optimizer: pure objects, their state explicit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_async_localsgd.protocol.ledger import Arrival

__all__ = [
    "Arrival",
    "AsyncBuffer",
    "Context",
    "DelayCompensation",
    "Poly",
    "PolyThres",
    "Transform",
    "check_transforms",
    "transform_delta",
]

_BLOCK = 1 << 16  # elements: the operands of one block stay in the cache
_MEMBERS = ("init", "accepts", "update", "per_delta", "needs_start")


class Context(NamedTuple):
    """What a transformation sees beside the pseudo-gradient. To be read, not written."""

    arrivals: Sequence[Arrival]
    """Whose delta the pseudo-gradient is: one, or with ``quorum > 1``, unless the transformation is ``per_delta``, all
    whose mean it is."""
    parameters: Tensor
    """Global parameters of now, θ_t, at the places of the pseudo-gradient: flat, fp32, on its device and of its shape.
    A ``per_delta`` transformation sees those of the beginning of the turn."""
    start: Tensor | None
    """Parameters from which the worker's round started, θ_t', of the same shape. None unless a ``per_delta``
    transformation of the chain declares ``needs_start``."""
    default_buffer_size: int
    """Outer updates in which every worker's delta is once: the number of workers, or fewer with ``quorum > 1``."""

    @property
    def staleness(self) -> float:
        """Versions that passed between the start of the round and this update; of a mean of deltas, their mean."""
        return sum(arrival.staleness for arrival in self.arrivals) / len(self.arrivals)


class Transform(Protocol):
    """A transformation of the pseudo-gradient: derive from it, or write an object with the same members.

    Transformations that are ``per_delta`` come first in a chain. The worker that has made a delta applies them before
    it sends the delta. The others are applied by every worker, to its own copy of the same pseudo-gradients in the same
    order, so the result must depend on the arguments alone, to the bit. Products and sums are separate operations
    (``mul_`` and then ``add_``, no ``add_(alpha=...)``, ``addcmul_`` or ``lerp_``): a fused multiply-add rounds once
    where two operations round twice, and whether it is used depends on the processor. The order in which a sum or norm
    over elements adds them up depends on the number of threads. Parameters that tell two transformations apart are
    attributes that hold plain values: workers compare them at the start.

    With ``quorum > 1`` deltas are added up while they arrive, so that the transformations that are not ``per_delta``
    get their mean and not each of them.
    """

    per_delta: ClassVar[bool] = False
    """Whether each element of the result depends on that element of one delta alone, its arrival, and that element of
    ``context``. Such a transformation is given the delta in parts, keeps no state and returns a tensor."""
    needs_start: ClassVar[bool] = False
    """Whether ``context.start`` is looked at; for ``per_delta`` transformations alone."""

    def init(self, parameters: Tensor) -> dict[str, Any]:
        """The state at the beginning: tensors and plain values, by name; saved in checkpoints.

        Args:
            parameters: a flat fp32 vector of the pseudo-gradient's shape and device. Its values mean nothing yet.
        """
        return {}

    def accepts(self, arrival: Arrival) -> bool:
        """Whether a delta is applied at all; asked of ``per_delta`` transformations alone, alike on every worker.

        A delta that one of them refuses is not sent. It moves neither parameters nor buffers, and counts as a version.
        """
        return True

    def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Context) -> Tensor | None:
        """Transform one pseudo-gradient.

        Args:
            pseudo_gradient: flat, fp32; may be changed in place. It is overwritten later: copy what is to be kept.
            state: what :meth:`init` gave; updated in place.
            context: what else there is to see.

        Returns:
            What goes on to the next transformation and at last to the outer optimizer, of the same shape; None if the
            parameters do not move now.
        """


@dataclass(frozen=True)
class Poly(Transform):
    """Polynomial penalty: ``g ← (1 + staleness)^(−power) g``.

    Each delta is weighted by its own staleness, also with ``quorum > 1``.

    Args:
        power: at least 0; 0 changes nothing.

    Raises:
        ValueError: if ``power`` is negative.

    References:
        Xie et al. 2019, Asynchronous Federated Optimization (arXiv 1903.03934); as a baseline in Liu et al. 2024,
        Asynchronous Local-SGD (arXiv 2401.09135).
    """

    power: float = 0.5

    per_delta: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_at_least(0, power=self.power)

    def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Context) -> Tensor | None:
        """Weigh by staleness."""
        return _weigh(pseudo_gradient, context.staleness, self.power)


@dataclass(frozen=True)
class PolyThres(Transform):
    """Polynomial penalty with a threshold: :class:`Poly`, and what is staler than ``threshold`` is dropped.

    Both go by the delta's own staleness, also with ``quorum > 1``: the mean is that of the deltas that remain.

    Args:
        power: at least 0.
        threshold: versions; a pseudo-gradient of exactly this staleness is still applied.

    Raises:
        ValueError: if an argument is negative.

    References:
        Liu et al. 2024, Asynchronous Local-SGD (arXiv 2401.09135), baselines.
    """

    power: float = 0.5
    threshold: int = 10

    per_delta: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_at_least(0, power=self.power, threshold=self.threshold)

    def accepts(self, arrival: Arrival) -> bool:
        """Whether the delta is not staler than the threshold."""
        return arrival.staleness <= self.threshold

    def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Context) -> Tensor | None:
        """Weigh by staleness."""
        return _weigh(pseudo_gradient, context.staleness, self.power)


@dataclass(frozen=True)
class DelayCompensation(Transform):
    """Delay compensation: ``g ← g + λ g ⊙ g ⊙ (θ_t − θ_t')``, with λ the ``strength``.

    A first-order estimate of the pseudo-gradient at the parameters of now, with ``λ g ⊙ g`` in place of the Hessian.
    λ depends on the scale of pseudo-gradients and is to be tuned: for inner SGD with learning rate η and H local steps,
    g is about ηH gradients, and the product of two gradients is ``g ⊙ g / (ηH)²``; the correction to g then has
    λ = 1/(ηH).

    Args:
        strength: λ, at least 0.

    Raises:
        ValueError: if ``strength`` is negative.

    References:
        Zheng et al. 2017, Asynchronous Stochastic Gradient Descent with Delay Compensation (arXiv 1609.08326);
        as a baseline in Liu et al. 2024, Asynchronous Local-SGD (arXiv 2401.09135).
    """

    strength: float = 1.0

    per_delta: ClassVar[bool] = True
    needs_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_at_least(0, strength=self.strength)

    def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Context) -> Tensor | None:
        """Add the correction."""
        assert context.start is not None
        if context.staleness > 0:  # else θ has not moved since
            moved = context.parameters.sub(context.start)
            pseudo_gradient.add_(moved.mul_(pseudo_gradient).mul_(pseudo_gradient).mul_(self.strength))
        return pseudo_gradient


@dataclass(frozen=True)
class AsyncBuffer(Transform):
    """Async buffer: of every ``size`` pseudo-gradients, first in first out, the mean goes on; else nothing moves.

    It needs single deltas in sequence. What comes after it in a chain sees the staleness of the last pseudo-gradient of
    the buffer alone.

    Args:
        size: N, pseudo-gradients per step of the outer optimizer; None: the number of workers (over ``quorum``, where
            one pseudo-gradient stands for several deltas).

    Raises:
        ValueError: if ``size`` is less than 1.

    References:
        Nguyen et al. 2022, Federated Learning with Buffered Asynchronous Aggregation (FedBuff, arXiv 2106.06639),
        Algorithm 1; as a baseline in Liu et al. 2024, Asynchronous Local-SGD (arXiv 2401.09135).
    """

    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            _check_at_least(1, size=self.size)

    def init(self, parameters: Tensor) -> dict[str, Any]:
        """An empty buffer; one vector of the parameters' shape."""
        return {"received": 0, "sum": parameters.new_zeros(parameters.shape)}

    def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Context) -> Tensor | None:
        """Gather, and give the mean once the buffer is full."""
        total, received = state["sum"], state["received"] + 1
        # Not equality: a run may go on with fewer workers than its buffer was filled by.
        if received < (self.size or context.default_buffer_size):
            if received == 1:
                total.copy_(pseudo_gradient)
            else:
                total.add_(pseudo_gradient)
            state["received"] = received
            return None
        state["received"] = 0
        if received > 1:
            for g, gathered in _blocks(pseudo_gradient, total):
                g.add_(gathered).div_(received)
        return pseudo_gradient


def check_transforms(transforms: Sequence[Transform]) -> None:
    """Refuse what is no chain of transformations.

    Raises:
        ValueError: naming what is wrong with it.
    """
    if isinstance(transforms, (str, type)) or not isinstance(transforms, Sequence):
        raise ValueError(f"`transforms` must be a list of transformations, for instance [Poly()], got {transforms!r}.")
    for transform in transforms:
        if isinstance(transform, type):
            raise ValueError(
                f"`transforms` holds the class {transform.__name__}: pass an object, {transform.__name__}()."
            )
        if missing := [name for name in _MEMBERS if not hasattr(transform, name)]:
            raise ValueError(
                f"`transforms` must hold objects with {', '.join(f'`{name}`' for name in _MEMBERS)} (see "
                f"`lightning_async_localsgd.outer.Transform`). {transform!r} lacks {', '.join(missing)}."
            )
        if transform.needs_start and not transform.per_delta:
            raise ValueError(
                f"{type(transform).__name__} needs the start of a round, which the delta's own worker alone has: set "
                "`per_delta = True` too."
            )
    for before, transform in pairwise(transforms):
        if transform.per_delta and not before.per_delta:
            raise ValueError(
                f"{type(transform).__name__} is applied to a delta before it is sent, and {type(before).__name__} "
                f"after: put {type(transform).__name__} first in `transforms`."
            )


@torch.no_grad()
def transform_delta(
    transforms: Sequence[Transform],
    delta: Tensor,
    arrival: Arrival,
    snapshot: Tensor,
    parameters: Tensor,
    default_buffer_size: int,
) -> None:
    """Put a delta through ``per_delta`` transformations, in place. All tensors are flat, fp32 and of one shape.

    The parameters that the round started from are ``delta + snapshot``. They exist for one block at a time.

    Args:
        transforms: all of them ``per_delta``.
        delta: the delta of a round.
        arrival: the round's worker and staleness.
        snapshot: what the worker held at the end of the round.
        parameters: the global parameters at the beginning of the turn.
        default_buffer_size: see :class:`Context`.

    Raises:
        TypeError: if a transformation returns no tensor.
    """
    needs_start = any(transform.needs_start for transform in transforms)
    for part, end, now in _blocks(delta, snapshot, parameters):
        context = Context((arrival,), now, part.add(end) if needs_start else None, default_buffer_size)
        transformed = part
        for transform in transforms:
            result = transform.update(transformed, {}, context)
            if result is None:
                raise TypeError(
                    f"{type(transform).__name__}.update has returned None. A transformation that is `per_delta` "
                    "refuses a delta by `accepts`."
                )
            transformed = result
        if transformed is not part:
            part.copy_(transformed)


def _weigh(pseudo_gradient: Tensor, staleness: float, power: float) -> Tensor:
    # The power is a double that is rounded to fp32 when it multiplies: libraries that differ in its last bit agree.
    weight = (1 + staleness) ** -power
    return pseudo_gradient if weight == 1 else pseudo_gradient.mul_(weight)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same part of each flat vector, one part after the other, so that intermediate results stay small."""
    first = tensors[0]
    size = _BLOCK if first.device.type == "cpu" else max(1, first.numel())
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _check_at_least(least: float, **arguments: float) -> None:
    for name, value in arguments.items():
        if not (value >= least and math.isfinite(value)):
            raise ValueError(f"`{name}` must be a number of at least {least:g}, got {value}.")
