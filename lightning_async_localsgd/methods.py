"""All methods by name: the settings of each for the strategy, a loop or a simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from lightning_async_localsgd.codecs import Codec, TopK
from lightning_async_localsgd.outer import (
    GROWTH,
    REACH,
    AsyncBuffer,
    DelayCompensation,
    DelayedNesterov,
    Poly,
    PolyThres,
    Transform,
)
from lightning_async_localsgd.protocol.pace import make_pace

__all__ = ["METHODS", "Method", "make_method"]


def _nesterov(params: Iterable[torch.nn.Parameter], lr: float, momentum: float, **options: Any) -> torch.optim.SGD:
    """SGD with Nesterov momentum, or plain SGD if the momentum is 0: torch refuses ``nesterov`` with it."""
    return torch.optim.SGD(params, lr=lr, momentum=momentum, nesterov=momentum > 0, **options)


_LIU = "Liu et al. 2024 (arXiv 2401.09135)"
_TUNED = "tuned in the paper to 0.05 to 0.1; 0.05 was best in this library's benchmark time_to_loss"


@dataclass(frozen=True)
class Method:
    """One method: a transformation of the pseudo-gradient, an outer optimizer and the time of updates."""

    description: str
    """Description in one line."""
    reference: str
    outer_lr: float
    """Default outer learning rate."""
    outer_lr_source: str
    """Source of that default."""
    optimizer: Callable[..., torch.optim.Optimizer] = _nesterov
    """Constructor of the outer optimizer; takes ``lr`` and ``momentum``."""
    outer_momentum: float = 0.9
    """Default outer momentum."""
    transform: Callable[..., Transform] | None = None
    """Constructor of the transformation of the pseudo-gradient, applied by the sender of a delta or on every worker."""
    pace: str = "fixed"
    """Default pace."""
    synchronous: bool = False
    """Whether every update waits for the deltas of all workers, and all workers wait for the update."""
    codec: Callable[..., Codec] | None = None
    """Constructor of the codec, where it is a part of the method; None: the user's choice."""
    exchange: str | None = None
    """How deltas come to the workers, where it is a part of the method; None: the user's choice."""


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "sync": Method(
            "Synchronous DiLoCo: one Nesterov step on the mean of all workers' pseudo-gradients",
            "Douillard et al. 2023, DiLoCo (arXiv 2311.08105), Algorithm 1",
            outer_lr=0.7,
            outer_lr_source="the paper's",
            synchronous=True,
        ),
        "async-nesterov": Method(
            "Async DiLoCo: a Nesterov step on every pseudo-gradient as it arrives",
            _LIU,
            outer_lr=0.05,
            outer_lr_source=_TUNED,
        ),
        "async-sgd": Method(
            "Async SGD: a plain gradient step on every pseudo-gradient",
            _LIU,
            outer_lr=0.5,
            outer_lr_source="sqrt(k)/k of four workers, by which the paper's authors scale deltas in their toy",
            optimizer=torch.optim.SGD,
            outer_momentum=0.0,
        ),
        "async-momentum": Method(
            "Async SGD with momentum: a heavy-ball step on every pseudo-gradient",
            _LIU,
            outer_lr=0.05,
            outer_lr_source="as async-nesterov, whose steps are about as long",
            optimizer=torch.optim.SGD,
        ),
        "poly": Method(
            "Polynomial penalty: stale pseudo-gradients weigh less, then Nesterov",
            f"Xie et al. 2019 (arXiv 1903.03934); {_LIU}",
            outer_lr=0.05,
            outer_lr_source="as async-nesterov",
            transform=Poly,
        ),
        "polythres": Method(
            "Polynomial penalty with a threshold: very stale pseudo-gradients are dropped, then Nesterov",
            _LIU,
            outer_lr=0.05,
            outer_lr_source="as async-nesterov",
            transform=PolyThres,
        ),
        "delay-compensation": Method(
            "Delay compensation: pseudo-gradients corrected by how far the parameters have moved since, then Nesterov",
            f"Zheng et al. 2017 (arXiv 1609.08326); {_LIU}",
            outer_lr=0.05,
            outer_lr_source="as async-nesterov",
            transform=DelayCompensation,
        ),
        "async-buffer": Method(
            "Async buffer (FedBuff): one Nesterov step on the mean of every N pseudo-gradients",
            f"Nguyen et al. 2022 (arXiv 2106.06639); {_LIU}",
            outer_lr=0.7,
            outer_lr_source="as sync: its steps are on means of as many pseudo-gradients",
            transform=AsyncBuffer,
        ),
        "dn": Method(
            "Delayed Nesterov: the gradient part on every pseudo-gradient, momentum once per N of them",
            f"{_LIU}, Algorithm 3; with DyLU, Eq. 6",
            outer_lr=0.7,
            outer_lr_source="the paper's",
            optimizer=DelayedNesterov,
            pace="dylu",
        ),
        "dn-growing": Method(
            "The default: delayed Nesterov whose momentum grows with the steps made",
            f"{_LIU}, Algorithm 3, with this library's growth (docs/cold-start.md)",
            outer_lr=1.0,
            outer_lr_source="that of plain averaging, from which it begins",
            optimizer=partial(DelayedNesterov, growth=GROWTH, reach=REACH),
            pace="dylu",
        ),
        "sparseloco": Method(
            "SparseLoCo: workers send the largest elements of error feedback that decays, in the place of a momentum",
            'Sarfi et al. 2025, "Communication Efficient LLM Pre-training with SparseLoCo" (arXiv 2508.15706)',
            outer_lr=1.0,
            outer_lr_source="the paper's",
            optimizer=partial(DelayedNesterov, whole_turns=True),
            outer_momentum=0.0,
            pace="dylu",
            codec=partial(TopK, bits=2, error_decay=0.95),
            exchange="gather",
        ),
    }
)
"""All methods, by name."""


def make_method(
    name: str,
    workers: int,
    outer_lr: float | None = None,
    outer_momentum: float | None = None,
    pace: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The settings of a method: keyword arguments for the strategy, ``AsyncLocalSGD``, ``Settings`` or ``simulate``.

    Example::

        AsyncLocalSGDStrategy(local_steps=50, **make_method("poly", workers=4, pace="dylu"))

    Args:
        name: a key of :data:`METHODS`.
        workers: number of workers.
        outer_lr: outer learning rate; None: the method's.
        outer_momentum: outer momentum; None: the method's.
        pace: ``"fixed"`` or ``"dylu"``; None: the method's, which is DyLU for ``"dn"`` (growing or not) and
            ``"sparseloco"``, and fixed for all others.
        **options: further arguments of the method's transformation (``power``, ``threshold``, ``strength``, ``size``)
            or codec (``density``, ``bits``, ``error_decay``) or, if it has neither, of its outer optimizer
            (``momentum_activation``, ``growth``, ``reach``).

    Returns:
        ``outer_optimizer``, ``transforms``, ``pace`` and ``quorum``; for ``"sync"`` also ``overlap=False``, for
        ``"sparseloco"`` ``codec`` and ``exchange``.

    Raises:
        ValueError: if there is no such method, or an argument is outside its range.
        TypeError: if the method has no such option.
    """
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}. Known are: {', '.join(sorted(METHODS))}.")
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}.")
    method = METHODS[name]
    momentum = method.outer_momentum if outer_momentum is None else outer_momentum
    arguments = {"lr": method.outer_lr if outer_lr is None else outer_lr, "momentum": momentum}
    if method.transform is None and method.codec is None:
        arguments |= options
        options = {}
    optimizer = partial(method.optimizer, **arguments)
    optimizer([torch.nn.Parameter(torch.zeros(1))])  # runs its own checks
    pace = method.pace if pace is None else pace
    make_pace(pace)
    settings: dict[str, Any] = {
        "outer_optimizer": optimizer,
        "transforms": () if method.transform is None else (method.transform(**options),),
        "pace": pace,
        "quorum": workers if method.synchronous else 1,
    }
    if method.synchronous:
        settings["overlap"] = False
    if method.codec is not None:
        settings["codec"] = method.codec(**options)
    if method.exchange is not None:
        settings["exchange"] = method.exchange
    return settings
