"""Copies of the weights in the state of inner optimizers, moved together with the weights."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["WeightCopies"]

_PARAMETERS = "params"  # in a group of an optimizer
_DEPTH = 3  # of lists within lists in an optimizer's attributes
_NEAR = 0.1  # distance to the parameters over their norm; moments of gradients are about as far away as zero


class WeightCopies:
    """Keeps the distance between the weights and their copies in inner optimizers when the weights are moved.

    Some optimizers write the parameters from a copy in their state (fp32 masters, dual averaging), or mix a copy into
    them (the slow weights of Lookahead, the base sequence of schedule-free learning). If a correction were added to the
    parameters alone, the next step would undo it. So every correction is also added to the copies.

    Args:
        module: the module to train.
        optimizers: its optimizers.
        names: the entries of an optimizer's state that hold copies of the weights; or its attributes or options that
            hold a list of copies, in the order of its parameters. None: :meth:`find` finds them by their values.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer], names: Sequence[str] | None = None) -> None:
        self._module = module
        self._given = None if names is None else frozenset(names)
        self.watch(optimizers)

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Replace the optimizers."""
        self._optimizers = list(optimizers)
        self.names: set[str] = set(self._given or ())
        """Names of the entries that hold copies."""
        self._looked_at: set[str] = set()

    @torch.no_grad()
    def find(self) -> None:
        """Look for copies in entries that are new in the optimizers since the last call.

        Call this soon after optimizers may have made entries: copies are recognized by values near the parameters.
        """
        if self._given is not None:
            return
        for optimizer in self._optimizers:
            entries = {k: pairs for k, pairs in self._entries(optimizer).items() if k not in self._looked_at}
            if type(optimizer).__module__.startswith("torch.optim."):  # none of these writes parameters from its state
                entries = {k: pairs for k, pairs in entries.items() if k == _PARAMETERS}
            self._looked_at |= entries.keys()
            new = sorted(name for name, pairs in entries.items() if _are_near(pairs))
            if new:
                self.names.update(new)
                warnings.warn(
                    f"{type(optimizer).__name__} holds copies of the parameters: {', '.join(new)}. What the parameters "
                    "take over from other workers is added to these, too, so that the optimizer does not undo it. Pass "
                    f"`weight_copies={new}` to say that this is right, or `weight_copies=[]` if they must stay.",
                    stacklevel=2,
                )

    @torch.no_grad()
    def move(self, by: Mapping[str, Tensor]) -> None:
        """Add the same tensors to the copies as to the parameters, given ``by`` name."""
        for name, copy in self._copies():
            if name in by:
                copy.add_(by[name].to(copy.device, copy.dtype))

    @torch.no_grad()
    def reset(self, to: Mapping[str, Tensor]) -> None:
        """Set the copies to these parameters, given by name."""
        for name, copy in self._copies():
            if name in to:
                copy.copy_(to[name])

    @contextmanager
    def moving_along(self) -> Iterator[None]:
        """Repeat on the copies the changes that the body makes to the module's parameters."""
        self.find()
        names = {name for name, _ in self._copies()}
        before = {name: p.detach().clone() for name, p in self._module.named_parameters() if name in names}
        yield
        with torch.no_grad():
            after = dict(self._module.named_parameters())
            self.move({name: after[name].detach() - value for name, value in before.items()})

    def tensors(self) -> list[Tensor]:
        """All copies, in the same order on all devices of a worker."""
        return [copy for _, copy in self._copies()]

    def _copies(self) -> list[tuple[str, Tensor]]:
        """The copies, each once, with the names of their parameters."""
        if not self.names:
            return []
        named = {id(p): name for name, p in self._module.named_parameters()}
        copies = {}
        for optimizer in self._optimizers:
            for entry, pairs in self._entries(optimizer).items():
                if entry in self.names:
                    copies.update({c.data_ptr(): (named[id(p)], c) for p, c in pairs})
        return list(copies.values())

    def _entries(self, optimizer: Optimizer) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Entries of an optimizer with the shapes of its parameters, each with its parameter, by name."""
        entries: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        own = {id(p) for p in self._module.parameters()}
        for inner in _with_inner(optimizer):
            parameters = [p for group in inner.param_groups for p in group["params"]]
            state: Mapping[Any, Any] = getattr(inner, "state", {})
            lists = _lists(inner)
            if not any(id(p) in own for p in parameters):  # it trains copies, and other code writes them back
                lists[_PARAMETERS] = parameters
                parameters = [p for p in self._module.parameters() if p.requires_grad]
            for name, tensors in lists.items():
                if [t.shape for t in tensors] == [p.shape for p in parameters]:
                    entries[name] += zip(parameters, tensors, strict=True)
            for name, pairs in _in_state(state, [p for p in parameters if id(p) in own]).items():
                entries[name] += pairs
        return {name: kept for name, pairs in entries.items() if (kept := [pair for pair in pairs if _is_copy(*pair)])}


def _with_inner(optimizer: Optimizer, seen: frozenset[int] = frozenset()) -> Iterator[Optimizer]:
    """An optimizer and its inner optimizers."""
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer) and id(value) not in seen | {id(optimizer)}:
            yield from _with_inner(value, seen | {id(optimizer)})


def _in_state(state: Mapping[Any, Any], parameters: Iterable[Tensor]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Entries of the state, by name, that have the shape of their parameter for all of the parameters."""
    entries: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for p in parameters:
        of_p = state.get(p, {})
        for name, value in of_p.items() if isinstance(of_p, Mapping) else ():
            if isinstance(value, Tensor) and name != "step":  # a step count has the shape of a scalar parameter
                entries[name].append((p, value))
    return {name: pairs for name, pairs in entries.items() if all(p.shape == value.shape for p, value in pairs)}


def _lists(optimizer: Optimizer) -> dict[str, list[Tensor]]:
    """The tensors in the attributes of an optimizer, and in the options of its groups, by name."""
    lists = {
        name: list(_tensors(value)) for name, value in vars(optimizer).items() if name not in ("state", "param_groups")
    }
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name != _PARAMETERS:
                lists.setdefault(name, []).extend(_tensors(value))
    return {name: tensors for name, tensors in lists.items() if tensors}


def _tensors(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)) and depth > 0:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, depth - 1)


def _is_copy(parameter: Tensor, tensor: Tensor) -> bool:
    """Whether ``tensor`` may be a copy of the parameter: not the parameter itself under another name."""
    return tensor.is_floating_point() and tensor.numel() > 0 and tensor.data_ptr() != parameter.data_ptr()


def _are_near(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether all of these tensors together are near the parameters; zeros and moments of gradients are not."""
    distance = torch.stack([(c.float().to(p.device) - p.float()).norm().cpu() for p, c in pairs]).norm()
    return bool(distance < _NEAR * torch.stack([p.float().norm().cpu() for p, _ in pairs]).norm())
