"""The outer level: the global state and the optimizers that move it. Pure: no threads, no communication."""

from lightning_async_localsgd.outer.delayed_nesterov import DelayedNesterov
from lightning_async_localsgd.outer.state import GlobalState, OuterOptimizerFactory

__all__ = ["DelayedNesterov", "GlobalState", "OuterOptimizerFactory"]
