"""The settings of a run, checked at their construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_async_localsgd.codecs import Codec, make_codec
from lightning_async_localsgd.outer import Constraint, GlobalModel, GlobalState, OuterOptimizerFactory, Transform
from lightning_async_localsgd.outer.layout import Layout
from lightning_async_localsgd.outer.transforms import check_transforms
from lightning_async_localsgd.protocol.codec_choice import Candidate, CodecChoice
from lightning_async_localsgd.protocol.pace import FixedPace, Pace, make_pace
from lightning_async_localsgd.protocol.round_length import AUTO, RoundLength

__all__ = ["REBASE", "Settings"]

_CHOSEN_CODECS = ("fp32", "bf16", "int8", "int4")
_EXCHANGES = ("auto", "reduce", "gather")
REBASE = "rebase"
_PLAIN = (str, int, float, list, tuple, dict)


@dataclass(frozen=True)
class Settings:
    """Settings of a run, as :class:`~lightning_async_localsgd.AsyncLocalSGDStrategy` documents them.

    Raises:
        ValueError: if a field is outside its range.
    """

    local_steps: int | str = AUTO
    outer_optimizer: OuterOptimizerFactory | None = None
    pace: str | Pace = "dylu"
    grace_period: float = 0.05
    quorum: int = 1
    overlap: bool = True
    budget: str = "shared"
    codec: str | Codec = AUTO
    exchange: str = "auto"
    fragments: int = 1
    merge: str | float = REBASE
    turns_per_round: float | str = AUTO
    outer_device: str | torch.device = "cpu"
    timeout: timedelta = field(default=timedelta(minutes=10))
    exchange_frozen: bool | None = None
    transforms: Sequence[Transform] = ()
    weight_copies: Sequence[str] | None = None
    local_buffers: Sequence[str] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.local_steps != AUTO and (not isinstance(self.local_steps, int) or self.local_steps < 1):
            raise ValueError(f"`local_steps` must be a whole number, at least 1, or 'auto', got {self.local_steps!r}.")
        if self.quorum < 1:
            raise ValueError(f"`quorum` must be at least 1, got {self.quorum}.")
        if self.grace_period < 0:
            raise ValueError(f"`grace_period` must be at least 0 seconds, got {self.grace_period}.")
        if not isinstance(self.fragments, int) or self.fragments < 1:
            raise ValueError(f"`fragments` must be a whole number, at least 1, got {self.fragments!r}.")
        if isinstance(self.local_steps, int) and self.local_steps < self.fragments:
            raise ValueError(
                f"`local_steps={self.local_steps}` are fewer than `fragments={self.fragments}`, of which one is pushed "
                "after the other in a round. Make rounds longer, or pass fewer fragments."
            )
        if self.constraint is not None and self.fragments > 1:
            raise ValueError(
                "`constraint` sees all parameters at once, and with `fragments` above 1 these move one part after the "
                "other. Pass `fragments=1`."
            )
        if self.merge != REBASE and (isinstance(self.merge, str) or not 0 <= self.merge <= 1):
            raise ValueError(
                "`merge` must be 'rebase', or a number from 0 (the global parameters alone) to 1 (the worker's own "
                f"alone), got {self.merge!r}."
            )
        if self.turns_per_round != AUTO and (isinstance(self.turns_per_round, str) or not self.turns_per_round >= 1):
            raise ValueError(
                "`turns_per_round` must be at least 1 (turns in a round of the fastest worker), or 'auto', got "
                f"{self.turns_per_round!r}."
            )
        if self.exchange not in _EXCHANGES:
            raise ValueError(f"`exchange` must be one of {', '.join(map(repr, _EXCHANGES))}, got {self.exchange!r}.")
        if self.budget not in ("shared", "per_worker"):
            raise ValueError(f"`budget` must be 'shared' or 'per_worker', got {self.budget!r}.")
        if self.timeout.total_seconds() <= self.grace_period:
            raise ValueError(
                "`timeout` must be positive and longer than `grace_period`, got "
                f"{self.timeout.total_seconds():g} s and {self.grace_period:g} s."
            )
        if self.outer_optimizer is not None:
            if not callable(self.outer_optimizer):
                raise ValueError(
                    "`outer_optimizer` must be a callable that makes an optimizer from parameters, for instance "
                    f"`functools.partial(torch.optim.SGD, lr=0.7)`, got {self.outer_optimizer!r}."
                )
            self.outer_optimizer([nn.Parameter(torch.zeros(1))])  # runs its own checks now, not at the start
        if isinstance(self.weight_copies, str):
            raise ValueError(f"`weight_copies` must be a list of names, got {self.weight_copies!r}.")
        if self.constraint is not None and not callable(self.constraint):
            raise ValueError(
                "`constraint` must be a function that changes a mapping from names to parameters in place, got "
                f"{self.constraint!r}."
            )
        check_transforms(self.transforms)
        if isinstance(self.local_buffers, str) or not all(isinstance(name, str) for name in self.local_buffers):
            raise ValueError(
                f'`local_buffers` must be a list of names or patterns, such as ["queue", "*.cache"], got '
                f"{self.local_buffers!r}."
            )
        make_pace(self.pace)
        self.codecs()

    def check_workers(self, workers: int) -> None:
        """Refuse settings that are impossible with this number of workers.

        Raises:
            ValueError: if ``quorum`` is larger than ``workers``.
        """
        if self.quorum > workers:
            raise ValueError(
                f"`quorum={self.quorum}` is larger than the number of workers, {workers}: no outer update could ever "
                f"take place. Pass at most {workers}."
            )

    @property
    def sums(self) -> bool | None:
        """Whether the deltas of a turn are added up on their way; None: if the outer optimizer can take their sum."""
        return {"auto": None, "reduce": True, "gather": False}[self.exchange]

    @property
    def local_share(self) -> float | None:
        """Share of the local parameters in their mean with the global ones at an adoption; None: steps are kept."""
        return None if isinstance(self.merge, str) else self.merge

    def layout(self, module: nn.Module) -> Layout:
        """The layout of a module.

        Raises:
            ValueError: see :class:`~lightning_async_localsgd.outer.layout.Layout`.
        """
        return Layout(module, bool(self.exchange_frozen), self.local_buffers, self.fragments)

    def global_model(self, layout: Layout, workers: int) -> GlobalModel:
        """A global model with these settings.

        Args:
            layout: the layout of the module.
            workers: number of workers.

        Raises:
            ValueError: see :class:`~lightning_async_localsgd.outer.GlobalState`.
        """
        device = torch.device(self.outer_device)
        make_state = partial(
            GlobalState,
            outer_optimizer=self.outer_optimizer,
            workers=workers,
            quorum=self.quorum,
            device=device,
            transforms=self.transforms,
            constraint=self.constraint,
            sums=self.sums,
        )
        return GlobalModel(layout, make_state, device)

    def codecs(self) -> dict[str, Codec]:
        """The codecs of a run by name, the widest first: of ``"auto"`` all that it chooses from, else one."""
        if self.codec == AUTO:
            return {name: make_codec(name) for name in _CHOSEN_CODECS}
        codec = make_codec(self.codec)
        return {codec.name: codec}

    @property
    def largest(self) -> float:
        """The largest magnitude that every codec of the run can write."""
        return min(codec.largest for codec in self.codecs().values())

    def codec_choice(self, elements: int) -> CodecChoice:
        """The policy that chooses among :meth:`codecs`.

        Args:
            elements: of a delta: of a fragment, the mean.
        """
        candidates = [Candidate(name, codec.wire_bytes(elements)) for name, codec in self.codecs().items()]
        return CodecChoice(candidates, self.fragments)

    def round_length(self, max_steps: int | None) -> RoundLength:
        """The policy that sets H in a run of ``max_steps`` local steps per worker; None: unknown."""
        return RoundLength(self.local_steps, max_steps, self.fragments)

    def lockstep(self, workers: int) -> bool:
        """Whether every worker's delta, of H steps each, is in every outer update: all make the same steps."""
        return self.quorum == workers and isinstance(make_pace(self.pace), FixedPace)

    def shares_budget(self, workers: int) -> bool:
        """Whether fast workers make more of the job's steps."""
        return self.budget == "shared" and not self.lockstep(workers)

    def differences(self, then: Mapping[str, Any]) -> list[str]:
        """The differences from other settings, given as their :meth:`fingerprint`, in one line each.

        Outer optimizers and transformations are not compared here, but by their states: their constructors may not
        reveal their settings.
        """
        now = self.fingerprint()
        names = now.keys() & then.keys() - {"outer_optimizer", "transforms", "outer_device"}
        return [f"`{name}` was {then[name]} and is {now[name]}" for name in sorted(names) if then[name] != now[name]]

    def fingerprint(self) -> dict[str, Any]:
        """The values that must be equal on all workers, as JSON values."""
        return {
            "local_steps": self.local_steps,
            "outer_optimizer": _describe(self.outer_optimizer),
            "transforms": [_describe_object(transform) for transform in self.transforms],
            "pace": _describe_object(self.pace),
            "grace_period": self.grace_period,
            "quorum": self.quorum,
            "overlap": self.overlap,
            "budget": self.budget,
            "codec": _describe_codec(self.codec),
            "exchange": self.exchange,
            "fragments": self.fragments,
            "merge": self.merge,
            "turns_per_round": self.turns_per_round,
            "outer_device": torch.device(self.outer_device).type,  # kinds of devices may round differently
            "exchange_frozen": bool(self.exchange_frozen),
            "constraint": _describe(self.constraint),
            "weight_copies": None if self.weight_copies is None else sorted(self.weight_copies),
            "local_buffers": sorted(self.local_buffers),
        }


def _describe(value: Any) -> str:
    """A description that is the same in every process, unlike a repr with an address."""
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, partial):
        arguments = [_describe(a) for a in value.args]
        arguments += [f"{k}={_describe(v)}" for k, v in sorted(value.keywords.items())]
        return f"{_describe(value.func)}({', '.join(arguments)})"
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{getattr(value, '__module__', '')}.{name}"


def _describe_codec(codec: str | Codec) -> str:
    """Its name and, of a dataclass, its parameters."""
    if isinstance(codec, str):
        return codec
    names: list[str] = [field.name for field in fields(codec)] if is_dataclass(codec) else []
    return f"{codec.name}({', '.join(f'{name}={getattr(codec, name)!r}' for name in names)})"


def _describe_object(value: Any) -> str:
    """A description with the attributes that hold plain values: distinguishes two objects of a small class."""
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    attributes = sorted(getattr(value, "__dict__", {}).items())
    known = [
        f"{k}={_describe_object(v)}" for k, v in attributes if v is None or isinstance(v, _PLAIN) or is_dataclass(v)
    ]
    return f"{_describe(value)}({', '.join(known)})"
