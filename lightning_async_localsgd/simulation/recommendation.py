"""Recommending: the smallest H and the least lossy codec that use the devices' time, or what stands in the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning_async_localsgd.simulation.costs import MEMORY_BANDWIDTH
from lightning_async_localsgd.simulation.network import Network
from lightning_async_localsgd.simulation.plan import TARGET, Plan, plan

__all__ = ["LOCAL_STEPS", "Recommendation", "recommend"]

LOCAL_STEPS = (10, 20, 50, 100, 200, 500)
"""The H that :func:`recommend` tries."""

CODECS = ("fp32", "bf16", "int8", "int4")
"""The codecs that it tries, the least lossy first."""


@dataclass(frozen=True)
class Recommendation:
    """Which H and codec to take."""

    plans: tuple[Plan, ...]
    """All that were tried: codec by codec, the least lossy first, with rising H."""
    best: Plan | None
    """The smallest H that reaches 99% utilization, with the least lossy codec that does; None if nothing does."""
    sentence: str
    """The recommendation, or what stands in its way, for people."""


def recommend(
    parameters: int, workers: Sequence[float], *, network: Network | None = None, **options: Any
) -> Recommendation:
    """Find the smallest H that reaches 99% utilization, and the least lossy codec with which it does.

    Args:
        parameters: see :func:`plan`, as all other arguments.
        workers: speed of each worker in local steps per second.
        network: between them.
        **options: further arguments of :func:`plan` but ``local_steps`` and ``codec``.

    Raises:
        ValueError: if an argument is outside its range.
    """
    network = network or Network()
    predict = partial(plan, parameters, workers, **options)
    tried = [steps for steps in LOCAL_STEPS if steps >= options.get("fragments", 1)]
    plans = tuple(predict(network=network, local_steps=steps, codec=codec) for codec in CODECS for steps in tried)
    best = min((p for p in plans if p.reaches_target), key=lambda p: p.local_steps, default=None)
    if best is not None:
        return Recommendation(
            plans,
            best,
            f"Take H = {best.local_steps} with {best.codec}: {best.utilization:.1%} of the devices' time is used.",
        )
    return Recommendation(plans, None, f"No H up to {LOCAL_STEPS[-1]} reaches {TARGET:.0%}: {_limit(predict, network)}")


# ---- what stands in the way ------------------------------------------------------------------------------------------


def _limit(predict: partial[Plan], network: Network) -> str:
    """Why nothing reaches the target, if the longest rounds and the smallest messages do not.

    Of several causes the one that is shortest of what it needs comes first.
    """
    predict = partial(predict, local_steps=LOCAL_STEPS[-1], codec=CODECS[-1])
    setting = f"H = {LOCAL_STEPS[-1]} with {CODECS[-1]}"
    if not predict(network=Network(), memory_bandwidth=math.inf).reaches_target:
        return "workers wait for each other, whatever the network; a method without a quorum does not."
    has_memory = predict.keywords.get("memory_bandwidth", MEMORY_BANDWIDTH)
    memory = _needed_memory(predict, has_memory)
    at_memory = partial(predict, memory_bandwidth=memory)
    link = _needed_link(at_memory, network)
    lacks = []
    if link is None:
        lacks.append((math.inf, _no_link(at_memory(network=network), setting)))
    elif link > 0:
        text = f"the network is too slow; {setting} needs {_mbit(link)} Mbit/s of each worker's link"
        lacks.append((link / network.bandwidth, text))
    if memory > has_memory:
        text = (
            f"copies and outer updates take too long at this memory bandwidth; {setting} needs {memory / 1e9:,.3g} GB/s"
        )
        lacks.append((memory / has_memory, text))
    lacks.sort(reverse=True)
    return ". Besides, ".join(text for _, text in lacks) + "."


def _needed_memory(predict: partial[Plan], here: float) -> float:
    """Memory bandwidth at which a network without limits reaches the target: that of here, or more."""
    planned = predict(network=Network(), memory_bandwidth=here)
    if planned.reaches_target:
        return here
    # What is exposed then are copies, whose time is that of the bytes.
    needed = here * (1 / planned.utilization - 1) / (1 / TARGET - 1)
    while not predict(network=Network(), memory_bandwidth=needed).reaches_target:
        needed *= 1.25
    return needed


def _needed_link(predict: partial[Plan], network: Network) -> float | None:
    """Bandwidth of each worker's link that reaches the target: 0 if it is reached here, None if none does."""
    here = predict(network=network)
    if here.reaches_target:
        return 0.0
    bandwidth = here.link_need
    for _ in range(8):
        if bandwidth == math.inf:
            break
        if predict(network=replace(network, bandwidth=bandwidth)).reaches_target:
            return bandwidth
        bandwidth *= 1.25
    return None


def _no_link(here: Plan, setting: str) -> str:
    alone = "latency, links of sites or outer updates"
    return f"even {setting} would not with any link of its own: {alone} take too long" + (
        "" if here.overlap else ". Training during the exchange (overlap) hides them"
    )


def _mbit(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8 / 1e6:,.0f}" if bytes_per_second >= 1.25e7 else f"{bytes_per_second * 8 / 1e6:,.3g}"
