"""The outer optimizer of a run that goes on: with the settings that are given now, from the state that was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_async_localsgd.outer.delayed_nesterov import STATE_OF_GROUPS, DelayedNesterov

__all__ = ["given_settings", "load_outer_optimizer"]


def given_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of an optimizer that has just been made, by parameter group."""
    return [{k: deepcopy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def load_outer_optimizer(
    optimizer: Optimizer,
    make: Callable[[Iterable[Parameter]], Optimizer],
    given: Sequence[Mapping[str, Any]],
    saved: Mapping[str, Any],
    saved_name: str | None,
    given_then: Sequence[Mapping[str, Any]] | None,
) -> list[str]:
    """Have an outer optimizer go on from a saved state.

    What is given now counts. A value that was changed during the run goes on where the same was given then as now.

    Args:
        optimizer: the outer optimizer, which has made no step.
        make: what has made it.
        given: :func:`given_settings` of it.
        saved: the ``state_dict`` of the one of then.
        saved_name: the name of its class; None: it is not known.
        given_then: :func:`given_settings` of it; None: they are not known.

    Returns:
        What differs, one line for each setting.

    Raises:
        ValueError: if it is of the same kind and has other parameter groups, or a setting does not suit the number of
            workers.
    """
    name, groups = type(optimizer).__qualname__, saved["param_groups"]
    unlike = saved_name is None and bool(_keys(groups) - _keys(optimizer.param_groups))
    if unlike or saved_name not in (None, name):
        return [f"the outer optimizer was {saved_name or 'another one'} and is {name}: its state begins anew"]
    sizes, sizes_then = ([len(group["params"]) for group in g] for g in (optimizer.param_groups, groups))
    if sizes != sizes_then:
        raise ValueError(
            f"The outer optimizer {name} of the checkpoint has parameter groups of {sizes_then} parameters, and the "
            f"one of now has {sizes}. Group the parameters as they were then, or begin anew from what "
            "`load_from_checkpoint` gives."
        )
    in_force = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(saved))
    differences = []
    for i, (group, now) in enumerate(zip(optimizer.param_groups, in_force, strict=True)):
        before = groups[i] if given_then is None else given_then[i]
        for key in now.keys() - {"params", *STATE_OF_GROUPS}:
            changed = key in before and not _same(before[key], given[i][key])
            if changed and given[i][key] is not None:
                differences.append(f"`{key}` of the outer optimizer was {before[key]} and is {given[i][key]}")
            if changed or key not in group or given_then is None or given[i][key] is None:
                group[key] = now[key]
    if isinstance(optimizer, DelayedNesterov):
        optimizer.suit_settings()
    elif missing := _missing_state(optimizer, make):
        optimizer.state.clear()
        differences.append(f"the outer optimizer now needs {missing}, which was not saved: its state begins anew")
    return sorted(set(differences))


def _keys(groups: Sequence[Mapping[str, Any]]) -> set[str]:
    return {key for group in groups for key in group}


def _same(one: Any, other: Any) -> bool:
    return (
        torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other
    )


def _missing_state(optimizer: Optimizer, make: Callable[[Iterable[Parameter]], Optimizer]) -> list[str]:
    """What the optimizer keeps for each parameter with the settings of now, and its state has not."""
    saved = [set(state) for state in optimizer.state.values() if state]
    if not saved:
        return []
    parameter = Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    probe = make([parameter])
    probe.step()
    return sorted(set(probe.state[parameter]) - set.intersection(*saved))
