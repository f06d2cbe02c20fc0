"""The outer level: the global state and what moves it. Pure: no threads, no communication."""

from lightning_async_localsgd.outer.delayed_nesterov import DelayedNesterov
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
    "write_delta",
]
