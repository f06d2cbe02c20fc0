"""The outer level: the global state and what moves it. Pure: no threads, no communication."""

from lightning_async_localsgd.outer.delayed_nesterov import GROWTH, REACH, DelayedNesterov, default_outer_optimizer
from lightning_async_localsgd.outer.delta import Adopter, Unsendable, write_delta
from lightning_async_localsgd.outer.global_model import GlobalModel
from lightning_async_localsgd.outer.state import Constraint, GlobalState, OuterOptimizerFactory
from lightning_async_localsgd.outer.sums import SumOptimizer, needs_single_deltas, takes_sums
from lightning_async_localsgd.outer.transforms import (
    Arrival,
    AsyncBuffer,
    Context,
    DelayCompensation,
    Poly,
    PolyThres,
    Transform,
)

__all__ = [
    "GROWTH",
    "REACH",
    "Adopter",
    "Arrival",
    "AsyncBuffer",
    "Constraint",
    "Context",
    "DelayCompensation",
    "DelayedNesterov",
    "GlobalModel",
    "GlobalState",
    "OuterOptimizerFactory",
    "Poly",
    "PolyThres",
    "SumOptimizer",
    "Transform",
    "Unsendable",
    "default_outer_optimizer",
    "needs_single_deltas",
    "takes_sums",
    "write_delta",
]
