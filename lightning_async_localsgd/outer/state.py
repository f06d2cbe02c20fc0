"""The global state: what every worker holds alike, moved only by outer updates applied in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_async_localsgd.outer.delayed_nesterov import DelayedNesterov, default_outer_optimizer
from lightning_async_localsgd.outer.layout import Fragment
from lightning_async_localsgd.outer.resuming import given_settings, load_outer_optimizer
from lightning_async_localsgd.outer.sums import as_sum_optimizer, needs_single_deltas, takes_sums
from lightning_async_localsgd.outer.transform_chain import TransformChain
from lightning_async_localsgd.outer.transforms import Arrival, Transform

__all__ = ["Constraint", "GlobalState", "OuterOptimizerFactory", "check_tensors"]

OuterOptimizerFactory = Callable[[Iterable[Parameter]], Optimizer]
Constraint = Callable[[Mapping[str, Tensor]], None]
"""Changes parameters, given by name, in place so that they keep a constraint. Must do the same on every worker."""


class GlobalState:
    """Global parameters, float buffers, outer optimizer and version of a fragment: a replicated state machine.

    Two replicas that start alike and apply the same pseudo-gradients in the same order stay equal to the bit.

    Args:
        layout: where each tensor of the fragment lies in the flat vector.
        outer_optimizer: makes the outer optimizer from the global parameters; None: :class:`DelayedNesterov` whose
            momentum grows.
        workers: number of workers; a ``DelayedNesterov`` whose ``buffer_size`` is open gets it from here.
        quorum: deltas that one outer update takes the mean of (1: each delta is an outer update of its own).
        device: where the state lives.
        transforms: what the pseudo-gradient goes through, in this order, before the outer optimizer.
        constraint: what the parameters are to keep after each outer update.
        sums: whether the deltas of a turn are added up on their way, so that with ``quorum=1`` one outer update takes
            the sum of several. Else each delta comes as it is. None: where it can be.
        flat: memory for the parameters and buffers; None: new memory.
        pseudo_gradient: memory for the pseudo-gradient; None: new memory.

    Raises:
        ValueError: if the outer optimizer's settings are impossible for this number of workers, the transformations are
            no chain, or something needs single deltas and there are to be sums.
    """

    def __init__(
        self,
        layout: Fragment,
        outer_optimizer: OuterOptimizerFactory | None = None,
        workers: int = 1,
        quorum: int = 1,
        device: torch.device | str = "cpu",
        transforms: Sequence[Transform] = (),
        constraint: Constraint | None = None,
        sums: bool | None = False,
        flat: Tensor | None = None,
        pseudo_gradient: Tensor | None = None,
    ) -> None:
        self.layout = layout
        self.workers = workers
        self.quorum = quorum
        self.flat = layout.empty(device) if flat is None else flat
        """Global parameters, then global buffers: fp32, shape ``(layout.numel,)``."""
        self.pseudo_gradient = layout.empty(device) if pseudo_gradient is None else pseudo_gradient
        """What :meth:`apply` consumes: fp32, shape ``(layout.numel,)``."""
        self.parameters = [Parameter(view) for view in self._parameter_views(self.flat)]
        for parameter, gradient in zip(self.parameters, self._parameter_views(self.pseudo_gradient), strict=True):
            parameter.grad = gradient
        make = outer_optimizer or default_outer_optimizer
        self.optimizer = make(self.parameters)
        self._make_optimizer = make
        self._sum_optimizer = as_sum_optimizer(self.optimizer)
        self._given = given_settings(self.optimizer)
        self._default_buffer_size = 1
        self.set_workers(workers)
        self._constraint = constraint
        self._by_name = layout.by_name(self.flat)
        self._flat_parameters = self.flat[: layout.parameter_numel]
        self._chain = TransformChain(transforms, self._flat_parameters, self._default_buffer_size)
        self.sums = self.can_sum if sums is None else sums
        """Whether deltas are added up on their way."""
        if sums and (reason := needs_single_deltas(self.optimizer, self.transforms, quorum)):
            raise ValueError(reason)
        self._holes = self._hole_values = torch.empty(0)
        self.version = 0
        """Number of outer updates so far: with ``quorum=1`` of deltas, else of means."""

    @torch.no_grad()
    def begin(self, tensors: Sequence[Tensor]) -> list[str]:
        """Begin from these tensors, in the order of the layout's slots.

        Elements of parameters that are not finite (masks) stay as they are for good; the rest is exchanged.

        Returns:
            The names of the parameters that have such elements.
        """
        torch._foreach_copy_(self.layout.views(self.flat), list(tensors))
        self._find_holes()
        slots = self.layout.parameter_slots
        return [s.name for s, p in zip(slots, self.parameters, strict=True) if not bool(torch.isfinite(p).all())]

    def set_workers(self, workers: int) -> None:
        """Tell how many workers take part from here on."""
        self.workers = workers
        # An update by the mean of `quorum` deltas counts as one, so a buffer of all workers' deltas is shorter.
        self._default_buffer_size = max(1, round(workers / self.quorum))
        if isinstance(self.optimizer, DelayedNesterov):
            self.optimizer.set_default_buffer_size(self._default_buffer_size)
            self.optimizer.follow_workers(self._default_buffer_size)

    def set_round_length(self, local_steps: int) -> None:
        """Tell H, local steps per round of the fastest worker, from here on; an outer optimizer may go by it."""
        if isinstance(self.optimizer, DelayedNesterov):
            self.optimizer.set_round_length(local_steps)

    def _find_holes(self) -> None:
        if bool(torch.isfinite(torch.stack(torch.aminmax(self._flat_parameters))).all()):  # without a copy
            self._holes = self._hole_values = torch.empty(0)
            return
        self._holes = (~torch.isfinite(self._flat_parameters)).nonzero().view(-1)
        self._hole_values = self._flat_parameters[self._holes].detach().clone()

    def clear_holes(self, flat: Tensor) -> None:
        """Put 0 where a parameter is not finite for good: ``flat`` (shape ``(layout.numel,)``) is a difference."""
        if self._holes.numel() > 0:
            flat[self._holes] = 0

    def _parameter_views(self, flat: Tensor) -> list[Tensor]:
        return self.layout.views(flat)[: self.layout.parameter_count]

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The transformations of the pseudo-gradient, in order."""
        return self._chain.transforms

    @property
    def can_sum(self) -> bool:
        """Whether deltas may be added up on their way; see :func:`~lightning_async_localsgd.outer.sums.takes_sums`."""
        return takes_sums(self.optimizer, self.transforms, self.quorum)

    def update_sizes(self, count: int) -> list[int]:
        """The number of deltas in each outer update of a turn that brings ``count`` deltas, in order."""
        if self.quorum > 1:
            return [count] if count else []
        if self.sums:
            assert self._sum_optimizer is not None
            return self._sum_optimizer.sum_sizes(count)
        return [1] * count

    def accepts(self, arrival: Arrival) -> bool:
        """Whether the transformations let this delta be applied at all."""
        return self._chain.accepts(arrival)

    @property
    def needs_start(self) -> bool:
        """Whether :meth:`transform_delta` looks at the global parameters."""
        return self._chain.needs_start

    @torch.no_grad()
    def transform_delta(
        self, delta: Tensor, arrival: Arrival, snapshot: Tensor, parameters: Tensor | None = None
    ) -> None:
        """Put a worker's delta through the transformations that its sender applies, in place.

        To be called by the sender alone, once the turn's headers are known, before the delta is written for the wire.
        All tensors are flat and fp32, of shape ``(layout.numel,)``; buffers stay.

        Args:
            delta: the delta, as :func:`~lightning_async_localsgd.outer.write_delta` has written it.
            arrival: worker and staleness.
            snapshot: what the worker held at the end of the round.
            parameters: the global parameters at the beginning of the turn; None: those of now.
        """
        numel = self.layout.parameter_numel
        now = self.flat if parameters is None else parameters
        if self._chain.transform_delta(delta[:numel], arrival, snapshot[:numel], now[:numel]):
            self.clear_holes(delta)  # transformations may have looked at the parameters

    @torch.no_grad()
    def apply(self, arrivals: Sequence[Arrival], refused: int = 0) -> None:
        """Make one outer update from :attr:`pseudo_gradient`, which is used up.

        With a quorum the mean of the deltas, else the one delta, goes through the transformations that are not
        ``per_delta`` and then, unless one of them holds it back, through the outer optimizer. With :attr:`sums` and
        ``quorum=1`` the outer optimizer takes the sum in one step. Buffers are mixed in any case: each worker's delta
        weighs 1/workers.

        Args:
            arrivals: workers and stalenesses of the deltas that ``pseudo_gradient`` is the sum of, of a number that
                :meth:`update_sizes` tells; none of them: nothing moves.
            refused: number of deltas that were not accepted. They count for the version alone.
        """
        deltas = len(arrivals)
        if deltas > 0:
            if self.quorum > 1 and deltas > 1:
                self.pseudo_gradient.div_(deltas)
                mixed = deltas / self.workers
            else:
                mixed = 1 / self.workers
            if self._chain.transform(self.pseudo_gradient[: self.layout.parameter_numel], arrivals):
                self.clear_holes(self.pseudo_gradient)  # transformations may have looked at the parameters
                self._move(deltas if self.quorum == 1 else 1)
            start = self.layout.parameter_numel
            if start < self.layout.numel:
                self.flat[start:].sub_(self.pseudo_gradient[start:].mul_(mixed))
        self.version += deltas + refused if self.quorum == 1 else 1

    def _move(self, count: int) -> None:
        """Have the outer optimizer move the parameters by the sum of so many pseudo-gradients."""
        if count == 1:
            self.optimizer.step()
        else:
            assert self._sum_optimizer is not None
            self._sum_optimizer.step(count=count)
        if self._holes.numel() > 0:
            self._flat_parameters[self._holes] = self._hole_values  # weight decay would make NaN of them
        if self._constraint is not None:
            self._constraint(self._by_name)

    @torch.no_grad()
    def measure(self, deltas: int = 1, every: int = 1) -> tuple[float, float]:
        """L2 norm of what :attr:`pseudo_gradient` is the sum of, and its cosine with the outer momentum.

        Of parameters alone, after the transformations that the sender applies and before the others. The cosine is NaN
        while there is no momentum. Between momentum updates that of delayed Nesterov holds the pseudo-gradients
        gathered since the last one as well.

        Args:
            deltas: how many workers' deltas ``pseudo_gradient`` is the sum of; the norm is that of their mean.
            every: look at every so-manieth element only; the norm is then that of these.
        """
        products = torch.zeros(3, dtype=torch.float64)
        for parameter in self.parameters:
            state = self.optimizer.state[parameter]
            momentum = state.get("momentum", state.get("momentum_buffer"))
            assert parameter.grad is not None
            gradient = parameter.grad.view(-1)[::every]
            products[0] += torch.linalg.vector_norm(gradient).double().cpu() ** 2
            if isinstance(momentum, Tensor):
                momentum = momentum.view(-1)[::every]
                products[1] += (gradient * momentum).sum().double().cpu()
                products[2] += torch.linalg.vector_norm(momentum).double().cpu() ** 2
        norm = products[0].sqrt()
        return float(norm) / deltas, float(products[1] / (norm * products[2].sqrt()))

    def checksum(self) -> int:
        """Sum of the bits of :attr:`flat` as 64-bit integers: cheap enough to compare at every exchange."""
        return int(self.flat.view(torch.int64).sum())

    def digest(self) -> str:
        """BLAKE2b hash (hex) of version, global parameters, buffers and the state of what moves them."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(str(self.version).encode())
        _hash_tensor(digest, self.flat)
        for parameter in self.parameters:
            _hash_state(digest, self.optimizer.state[parameter])
        for group in self.optimizer.param_groups:
            told = group.keys() - {"params"} - ({"buffer_size"} if getattr(self.optimizer, "left_open", ()) else set())
            digest.update(repr([(k, group[k]) for k in sorted(told)]).encode())
        for state in self._chain.states:
            _hash_state(digest, state)
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the global parameters and buffers, by name, on the CPU."""
        flat = self.flat.to("cpu", copy=True)
        return {slot.name: view for slot, view in zip(self.layout.slots, self.layout.views(flat), strict=True)}

    @torch.no_grad()
    def state_dict(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Version, global parameters and buffers by name, state of outer optimizer and transformations; all copies.

        Args:
            tensors: where to copy parameters and buffers, as :meth:`tensors` gave them; None: new tensors.
        """
        if tensors:
            for slot, view in zip(self.layout.slots, self.layout.views(self.flat), strict=True):
                tensors[slot.name].copy_(view)
        return {
            "version": self.version,
            "tensors": dict(tensors) if tensors else self.tensors(),
            "optimizer": deepcopy(self.optimizer.state_dict()),
            "optimizer_name": type(self.optimizer).__qualname__,
            "optimizer_given": self._given,
            "transforms": self._chain.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Take over a state saved by :meth:`state_dict`. Settings are those given to this object, not those of then.

        Transformations that it does not know begin anew.

        Returns:
            What differs from the settings of then, in one line each.

        Raises:
            ValueError: if it belongs to another model, in which case nothing is changed, or to an outer optimizer with
                other parameter groups; the difference is named.
        """
        tensors = state_dict["tensors"]
        check_tensors(self.layout, tensors)
        for slot, view in zip(self.layout.slots, self.layout.views(self.flat), strict=True):
            view.copy_(tensors[slot.name])
        self.layout.clear_gaps(self.flat)  # of which the checksum is, too
        self._find_holes()
        differences = load_outer_optimizer(
            self.optimizer,
            self._make_optimizer,
            self._given,
            state_dict["optimizer"],
            state_dict.get("optimizer_name"),
            state_dict.get("optimizer_given"),
        )
        differences += self._chain.load_state_dict(state_dict.get("transforms", ()), self._own_copy)
        self.version = state_dict["version"]
        return differences

    def _own_copy(self, value: Any) -> Any:
        return value.to(self.flat.device, copy=True) if isinstance(value, Tensor) else deepcopy(value)


def check_tensors(layout: Fragment, tensors: Mapping[str, Tensor]) -> None:
    """Refuse saved tensors of another model.

    Raises:
        ValueError: naming the difference.
    """
    for slot in layout.slots:
        found = tuple(tensors[slot.name].shape) if slot.name in tensors else None
        if found != slot.shape:
            raise ValueError(
                f"The saved state has {slot.name!r} as {found}, this model as {slot.shape}. Go on with the "
                "model and the frozen layers of then, or begin anew from what `load_from_checkpoint` gives."
            )
    if extra := sorted(tensors.keys() - {slot.name for slot in layout.slots}):
        raise ValueError(f"The saved state has tensors that this model does not train: {extra}.")


def _hash_tensor(digest: hashlib.blake2b, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _hash_state(digest: hashlib.blake2b, state: Mapping[str, Any]) -> None:
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            _hash_tensor(digest, value)
        else:
            digest.update(repr(value).encode())
