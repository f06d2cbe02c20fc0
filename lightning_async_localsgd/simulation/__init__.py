"""Simulation: the algorithms of a real run under a virtual clock, in one process."""

from lightning_async_localsgd.simulation.devices import (
    ChangingDevice,
    ConstantDevice,
    Device,
    NoisyDevice,
    VirtualWorker,
)
from lightning_async_localsgd.simulation.network import Network
from lightning_async_localsgd.simulation.plan import Plan, plan
from lightning_async_localsgd.simulation.recommendation import Recommendation, recommend
from lightning_async_localsgd.simulation.result import (
    Evaluation,
    LossPoint,
    SimulatedRound,
    SimulatedUpdate,
    SimulatedWait,
    SimulationResult,
)
from lightning_async_localsgd.simulation.simulation import Simulation, simulate

__all__ = [
    "ChangingDevice",
    "ConstantDevice",
    "Device",
    "Evaluation",
    "LossPoint",
    "Network",
    "NoisyDevice",
    "Plan",
    "Recommendation",
    "SimulatedRound",
    "SimulatedUpdate",
    "SimulatedWait",
    "Simulation",
    "SimulationResult",
    "VirtualWorker",
    "plan",
    "recommend",
    "simulate",
]
