"""The outer level: the global state and what moves it. Pure: no threads, no communication."""

from lightning_async_localsgd.outer.delayed_nesterov import GROWTH, REACH, DelayedNesterov, default_outer_optimizer
from lightning_async_localsgd.outer.delta import Adopter, Unsendable, write_delta
from lightning_async_localsgd.outer.state import Constraint, GlobalState, OuterOptimizerFactory
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
    "GlobalState",
    "OuterOptimizerFactory",
    "Poly",
    "PolyThres",
    "Transform",
    "Unsendable",
    "default_outer_optimizer",
    "write_delta",
]
