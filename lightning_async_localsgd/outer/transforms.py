"""Transformations of the pseudo-gradient, chained before the outer optimizer: pure objects, their state explicit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

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
]

_BLOCK = 1 << 16  # elements: the operands of one block stay in the cache


class Context(NamedTuple):
    """What a transformation sees beside the pseudo-gradient. To be read, not written."""

    arrivals: Sequence[Arrival]
    """Whose delta the pseudo-gradient is; with ``quorum > 1``, whose mean."""
    parameters: Tensor
    """Global parameters of now, θ_t: flat, fp32, on the state's device, of the pseudo-gradient's shape."""
    start: Tensor | None
    """Global parameters from which the worker's round started, θ_t'; ``parameters`` itself if they have not moved
    since. None unless a transformation of the chain declares ``needs_start``."""
    default_buffer_size: int
    """Outer updates in which every worker's delta is once: the number of workers, or fewer with ``quorum > 1``."""

    @property
    def staleness(self) -> float:
        """Versions that passed between the start of the round and this update; of a mean of deltas, their mean."""
        return sum(arrival.staleness for arrival in self.arrivals) / len(self.arrivals)


class Transform(Protocol):
    """A transformation of the pseudo-gradient: derive from it, or write an object with the same three members.

    Every worker transforms its own copy of the same pseudo-gradients in the same order, so the result must depend on
    the arguments alone, to the bit. Products and sums are separate operations (``mul_`` and then ``add_``, no
    ``add_(alpha=...)``, ``addcmul_`` or ``lerp_``): a fused multiply-add rounds once where two operations round twice,
    and whether it is used depends on the processor. The order in which a sum or norm over elements adds them up depends
    on the number of threads. Parameters that tell two transformations apart are attributes that
    hold plain values: workers compare them at the start.

    With ``quorum > 1`` deltas are added up while they arrive, so that their mean is transformed and not each of them.
    """

    needs_start: ClassVar[bool] = False
    """Whether ``context.start`` is looked at. Up to ``workers`` copies of the parameters are kept for it, and it is
    refused with ``quorum > 1``, where a mean has no one start."""

    def init(self, parameters: Tensor) -> dict[str, Any]:
        """The state at the beginning: tensors and plain values, by name; saved in checkpoints.

        Args:
            parameters: a flat fp32 vector of the pseudo-gradient's shape and device. Its values mean nothing yet.
        """
        return {}

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

    With ``quorum > 1`` the mean of the deltas is weighted by their mean staleness.

    Args:
        power: at least 0; 0 changes nothing.

    Raises:
        ValueError: if ``power`` is negative.

    References:
        Xie et al. 2019, Asynchronous Federated Optimization (arXiv 1903.03934); as a baseline in Liu et al. 2024,
        Asynchronous Local-SGD (arXiv 2401.09135).
    """

    power: float = 0.5

    def __post_init__(self) -> None:
        _check_at_least(0, power=self.power)

    def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Context) -> Tensor:
        """Weigh by staleness."""
        return _weigh(pseudo_gradient, context.staleness, self.power)


@dataclass(frozen=True)
class PolyThres(Transform):
    """Polynomial penalty with a threshold: :class:`Poly`, and what is staler than ``threshold`` is dropped.

    With ``quorum > 1`` both go by the mean staleness of the deltas whose mean is transformed.

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

    def __post_init__(self) -> None:
        _check_at_least(0, power=self.power, threshold=self.threshold)

    def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Context) -> Tensor | None:
        """Weigh by staleness, or drop."""
        if context.staleness > self.threshold:
            return None
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

    needs_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_at_least(0, strength=self.strength)

    def update(self, pseudo_gradient: Tensor, state: dict[str, Any], context: Context) -> Tensor:
        """Add the correction."""
        assert context.start is not None
        if context.start is not context.parameters:
            for g, now, start in _blocks(pseudo_gradient, context.parameters, context.start):
                g.add_(now.sub(start).mul_(g).mul_(g).mul_(self.strength))
        return pseudo_gradient


@dataclass(frozen=True)
class AsyncBuffer(Transform):
    """Async buffer: of every ``size`` pseudo-gradients, first in first out, the mean goes on; else nothing moves.

    Put it last in a chain: what comes after it sees the staleness of the last pseudo-gradient of the buffer alone.

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


def check_transforms(transforms: Sequence[Transform], quorum: int) -> None:
    """Refuse what is no chain of transformations, or one that cannot be right with this quorum.

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
        methods = (getattr(transform, "init", None), getattr(transform, "update", None))
        if not (all(map(callable, methods)) and hasattr(transform, "needs_start")):
            raise ValueError(
                "`transforms` must hold objects with `init`, `update` and `needs_start` (see "
                f"`lightning_async_localsgd.outer.Transform`), got {transform!r}."
            )
        if transform.needs_start and quorum > 1:
            raise ValueError(
                f"`transforms` holds {type(transform).__name__}, which needs the parameters that a delta's round "
                f"started from; with `quorum={quorum}` it would get the mean of deltas from different starts. "
                "Use it with `quorum=1`."
            )


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
