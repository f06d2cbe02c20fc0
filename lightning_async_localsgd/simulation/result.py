"""The result of a simulated run: every round, outer update and evaluation, and each worker's use of its time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

__all__ = ["Evaluation", "LossPoint", "SimulatedRound", "SimulatedUpdate", "SimulatedWait", "SimulationResult"]


@dataclass(frozen=True)
class SimulatedUpdate:
    """One delta of one worker, as the outer state received it."""

    time: float
    """Virtual seconds since the start of the run."""
    version: int
    """Outer updates applied, this one included."""
    worker: int
    round: int
    local_steps: int
    samples: int
    staleness: int
    """Versions that passed between the start of the round and this update."""


@dataclass(frozen=True)
class LossPoint:
    """The mean training loss of one round."""

    time: float
    """Virtual seconds at the end of the round."""
    local_steps: int
    """Local steps of all workers together until then."""
    worker: int
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """Metrics of the global model at one time."""

    time: float
    """Virtual seconds."""
    version: int
    local_steps: int
    """Local steps of all workers together until then."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class SimulatedRound:
    """One round of one worker, in virtual seconds."""

    worker: int
    round: int
    begin: float
    """Start of its first local step."""
    end: float
    """End of its last local step."""
    local_steps: int
    adopted: float
    """Adoption of the global parameters that contain this round; with overlap the worker trains until then."""


@dataclass(frozen=True)
class SimulatedWait:
    """A time in which a worker made no step, because it waited for the exchange or for the others; virtual seconds.

    With ``overlap`` a wait can lie within a round: a worker that has made its share of the budget gets more of it when
    others turn out to be slower.
    """

    worker: int
    begin: float
    end: float


@dataclass(frozen=True)
class SimulationResult:
    """A simulated run, or its part up to the call of :meth:`Simulation.result`. Times are virtual seconds."""

    workers: int
    settings: dict[str, Any]
    """The settings of the run, as JSON values."""
    seconds: float
    """Length of the run."""
    local_steps: tuple[int, ...]
    """Local steps of each worker."""
    version: int
    """Outer updates applied."""
    updates: list[SimulatedUpdate]
    losses: list[LossPoint]
    evaluations: list[Evaluation]
    rounds: list[SimulatedRound]
    waits: list[SimulatedWait]
    """Waits up to each worker's last step, without the final wait for the others."""
    present_seconds: tuple[float, ...]
    """Time between the joining and the leaving of each worker."""
    busy_seconds: tuple[float, ...]
    """Time each worker spent on local steps."""
    waiting_seconds: tuple[float, ...]
    """Time each worker was blocked on the exchange."""
    bytes_sent: tuple[int, ...]
    """Bytes each worker sent."""
    bytes_received: tuple[int, ...]
    mean_staleness: float
    """Mean over all updates."""
    max_staleness: int
    dropped: tuple[int, ...]
    """Number of deltas of each worker that were not applied."""
    digest: str
    """Hash (hex) of the final global parameters and outer state."""
    state_dict: dict[str, Tensor]
    """Global parameters by name."""

    @property
    def total_local_steps(self) -> int:
        """Local steps of all workers together."""
        return sum(self.local_steps)

    @property
    def utilization(self) -> float:
        """Local steps made over those possible while the devices were present: busy over present time.

        Between 0 and 1; 0 for a run that has not begun.
        """
        available = sum(self.present_seconds)
        return sum(self.busy_seconds) / available if available else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything except the parameters, including the properties, as values that the ``json`` module writes."""
        kept = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "state_dict"}
        for name in ("updates", "losses", "evaluations", "rounds", "waits"):
            kept[name] = [asdict(entry) for entry in kept[name]]
        for name, value in kept.items():
            kept[name] = list(value) if isinstance(value, tuple) else value
        return kept | {"total_local_steps": self.total_local_steps, "utilization": self.utilization}
