"""The replica of a worker: its module, and the two flat vectors for writing deltas and for adopting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from lightning_async_localsgd.exchange import Adoption
from lightning_async_localsgd.exchange.accelerator import can_pin, copied
from lightning_async_localsgd.outer import Adopter, Constraint
from lightning_async_localsgd.outer.layout import Layout
from lightning_async_localsgd.worker.adoption_check import AdoptionCheck
from lightning_async_localsgd.worker.weight_copies import WeightCopies

__all__ = ["Replica", "WrittenRound", "forget_non_finite_state", "unversioned"]


class WrittenRound(NamedTuple):
    """The vectors of a finished round, flat and fp32, on the outer device. The replica has given them up."""

    base: Tensor
    """The parameters at the start of the worker's progress."""
    snapshot: Tensor
    """The parameters of the pushed fragment at the end of the round."""
    ready: Callable[[], object]
    """A function that waits until ``snapshot`` is filled (a copy from an accelerator may still run)."""


class Replica:
    """The module of a worker during a run.

    Between two pushes it holds two flat vectors: the base (the parameters at the start of the worker's progress), and
    memory for a snapshot of a fragment. :meth:`write` gives both away, :meth:`adopt` or :meth:`take_back` returns both.

    Args:
        module: the module, on its device.
        optimizers: its inner optimizers.
        layout: the layout of its exchanged tensors in a flat vector.
        weight_copies: names of copies of the weights in the optimizers' states; None: they are found automatically.
        constraint: applied to the parameters after each adoption.
        local_share: share of the local parameters in their mean with the global ones, where steps were made during the
            exchange; None: these steps are kept.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        layout: Layout,
        weight_copies: Sequence[str] | None = None,
        constraint: Constraint | None = None,
        local_share: float | None = None,
    ) -> None:
        self.module = module
        self.layout = layout
        self.copies = WeightCopies(module, optimizers, weight_copies)
        self.base: Tensor | None = None
        """The parameters at the start of the worker's progress; None while a delta is in flight."""
        self._snapshot: Tensor | None = None  # as long as the longest fragment
        self._optimizers = list(optimizers)
        self._adopter = Adopter(layout)
        self._adopters = [Adopter(part) for part in layout.fragments]
        self._check = AdoptionCheck()
        self._constraint = constraint
        self._local_share = local_share
        self._outer_device = torch.device("cpu")
        self._stashed: list[Tensor] | None = None  # set while the module holds the global tensors
        self._adopted: Callable[[], object] = lambda: None

    # ---- tensors ----------------------------------------------------------------------------------------------------

    @property
    def in_module(self) -> list[Tensor]:
        """The exchanged tensors in the module."""
        return self.layout.tensors(self.module)

    @property
    def own(self) -> list[Tensor]:
        """This worker's own exchanged tensors: the module's, or their copies while the module holds the global ones."""
        return self.in_module if self._stashed is None else self._stashed

    def exchanged(self, fragments: Iterable[int]) -> list[Tensor]:
        """The worker's own tensors of some fragments, and all copies of weights in the optimizers."""
        own, parts = self.own, self.layout.fragments
        return [tensor for i in sorted(fragments) for tensor in own[parts[i].members]] + self.copies.tensors()

    @property
    def others(self) -> dict[str, Tensor]:
        """The module's tensors that are not exchanged, by name."""
        return self.layout.others(self.module)

    @property
    def device(self) -> torch.device:
        """The device of the module."""
        return self.in_module[0].device

    @property
    def rounds_base(self) -> bool:
        """Whether the module cannot hold the base in full precision."""
        return bool(self._adopter.rounds)

    @torch.no_grad()
    def load(self, flat: Tensor) -> None:
        """Copy a flat vector into the module."""
        torch._foreach_copy_(self.in_module, self.layout.views(flat), True)

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """Replace the inner optimizers."""
        self._optimizers = list(optimizers)
        self.copies.watch(optimizers)

    def transfers(self) -> Callable[[], object]:
        """A function that waits, on any thread, for this thread's copies to or from an accelerator."""
        return copied(self.device if self._outer_device.type == "cpu" else self._outer_device)

    def synchronize(self) -> None:
        """Wait for copies to or from an accelerator, before their sources change."""
        self.transfers()()

    # ---- rounds -----------------------------------------------------------------------------------------------------

    def begin(self, flat: Tensor) -> None:
        """Begin the first round.

        Args:
            flat: the global parameters and buffers, on the outer device.
        """
        self._outer_device = flat.device
        self._adopted = self.synchronize
        pinned = can_pin(self.device, flat.device)
        self.base = self.layout.empty(flat.device, pinned)
        self.base.copy_(flat)
        self._adopter.hold(self.in_module, self.base)
        longest = max(part.numel for part in self.layout.fragments)
        self._snapshot = torch.zeros(longest, device=flat.device, pin_memory=pinned)
        self.copies.find()

    @property
    def in_flight(self) -> bool:
        """Whether the vectors are given away: the adoption of the last push is outstanding."""
        return self.base is None

    def stepped(self, first: bool) -> None:
        """Handle the end of a local step.

        Args:
            first: whether the step was the first of a round.
        """
        if first:
            self.copies.find()
        if self._check.pending:
            self._check.stepped(self.own, self._optimizers)

    @torch.no_grad()
    def write(self, fragment: int, steps: int) -> WrittenRound:
        """Take a snapshot of the current parameters of a fragment and give both vectors away.

        Args:
            fragment: the fragment.
            steps: local steps since its last push.
        """
        assert self.base is not None and self._snapshot is not None
        part = self.layout.fragments[fragment]
        tensors = self.in_module[part.members]
        self.layout.check_trainable(self.module)
        self._adopted()  # the user's code may have moved to another stream
        snapshot = self._snapshot[: part.numel]
        torch._foreach_copy_(part.views(snapshot), tensors, True)
        if len(self.layout.fragments) > 1:
            part.clear_gaps(snapshot)
        self._check.pushed(steps)
        written = WrittenRound(self.base, snapshot, self.transfers())
        self.base = None
        return written

    def take_back(self, base: Tensor) -> None:
        """Return the vectors of a push to the replica."""
        self.base = base

    @torch.no_grad()
    def adopt(self, adoption: Adoption, steps: int) -> None:
        """Adopt new global parameters and keep the steps since the push; these are part of the next delta.

        Args:
            adoption: the global parameters.
            steps: local steps since the push.
        """
        with record_function("async_localsgd::adopt"):
            if adoption.restart:
                self._adopter.replace(self.own, adoption.base)
                forget_non_finite_state(self._optimizers)
                self.copies.reset(self.layout.by_name(adoption.base))
            else:
                self._adopt_fragment(adoption, steps)
            self._adopted = self.transfers()
            if self._constraint is not None:
                own = zip(self.layout.parameter_slots, self.own, strict=False)
                self._constraint({slot.name: tensor for slot, tensor in own})
            if not adoption.restart:
                part = self.layout.fragments[adoption.fragment]
                parameters = slice(part.members.start, part.members.start + part.parameter_count)
                self._check.adopted(parameters, self.own, part.views(adoption.correction)[: part.parameter_count])
            self.base = adoption.base

    def _adopt_fragment(self, adoption: Adoption, steps: int) -> None:
        part, adopter = self.layout.fragments[adoption.fragment], self._adopters[adoption.fragment]
        own, base = self.own[part.members], adoption.base[part.span]
        if steps == 0:
            adopter.replace(own, base, adoption.correction)
            self.copies.move(part.by_name(adoption.correction))
        else:
            correction = adoption.correction.to(self.device, non_blocking=True)
            if self._local_share is not None:
                adopter.share(own, base, correction, self._local_share)
            adopter.advance(own, base, correction, adoption.unsendable.buffers)
            self.copies.move(part.by_name(correction))

    @torch.no_grad()
    def rebase(self, fragment: int, base: Tensor, correction: Tensor) -> None:
        """Move the current progress of a fragment to newer global parameters, as in an adoption.

        Args:
            fragment: the fragment.
            base: its current global parameters.
            correction: their difference from those at the start of the progress.
        """
        assert self.base is not None
        part = self.layout.fragments[fragment]
        self.base[part.span].copy_(base)
        correction = correction.to(self.device)
        self._adopters[fragment].advance(self.in_module[part.members], self.base[part.span], correction, ())
        self.copies.move(part.by_name(correction))

    # ---- swapping in the global parameters ---------------------------------------------------------------------------

    @property
    def global_swapped_in(self) -> bool:
        """Whether the module holds the global parameters, and the replica its own."""
        return self._stashed is not None

    def stash_local(self) -> None:
        """Keep a copy of the worker's own tensors, until :meth:`swap_in_local`."""
        self._stashed = [tensor.clone() for tensor in self.in_module]

    @torch.no_grad()
    def swap_in_global(self, flat: Tensor) -> None:
        """Put the global parameters and buffers into the module, after :meth:`stash_local`."""
        torch._foreach_copy_(unversioned(self.in_module), self.layout.views(flat))
        self.synchronize()

    @torch.no_grad()
    def swap_in_local(self) -> None:
        """Put the worker's own tensors back, bit for bit."""
        assert self._stashed is not None
        torch._foreach_copy_(unversioned(self.in_module), self._stashed)
        self._stashed = None


def forget_non_finite_state(optimizers: Iterable[Optimizer]) -> None:
    """Reset non-finite optimizer state, which would make fresh parameters non-finite at the next step."""
    for optimizer in optimizers:
        for parameter, state in list(optimizer.state.items()):
            if not all(bool(torch.isfinite(v).all()) for v in state.values() if isinstance(v, Tensor)):
                del optimizer.state[parameter]


def unversioned(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Aliases of tensors that do not count versions, for temporary writes that a backward pass must not notice."""
    return [tensor.data for tensor in tensors]
