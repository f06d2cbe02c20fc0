"""The chain of transformations of a global state: some are applied by the sender of a delta, the others everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor

from lightning_async_localsgd.outer.transforms import Arrival, Context, Transform, check_transforms, transform_delta

__all__ = ["TransformChain"]


class TransformChain:
    """Transformations with their states.

    Args:
        transforms: the transformations, in order. Those that are ``per_delta`` come first.
        parameters: the global parameters, flat and fp32.
        default_buffer_size: outer updates in which the delta of every worker is once.

    Raises:
        ValueError: if this is no chain of transformations.
    """

    def __init__(self, transforms: Sequence[Transform], parameters: Tensor, default_buffer_size: int) -> None:
        check_transforms(transforms)
        self.transforms = tuple(transforms)
        self._parameters = parameters
        self._default_buffer_size = default_buffer_size
        self._states = self._initial_states()
        self._of_sender = [transform for transform in self.transforms if transform.per_delta]
        for transform, state in zip(self._of_sender, self._states, strict=False):
            if state:
                raise ValueError(f"{type(transform).__name__} keeps a state, so it cannot be `per_delta`.")

    @property
    def needs_start(self) -> bool:
        """Whether :meth:`transform_delta` looks at the global parameters."""
        return any(transform.needs_start for transform in self._of_sender)

    @property
    def states(self) -> Iterator[dict[str, Any]]:
        """The states of all transformations, in order."""
        return iter(self._states)

    def accepts(self, arrival: Arrival) -> bool:
        """Whether a delta is to be applied at all."""
        return all(transform.accepts(arrival) for transform in self._of_sender)

    def transform_delta(self, delta: Tensor, arrival: Arrival, snapshot: Tensor, parameters: Tensor) -> bool:
        """Apply the transformations of the sender to its delta, in place. All tensors have the parameters' shape.

        Args:
            delta: the delta.
            arrival: its worker and staleness.
            snapshot: the parameters of the worker at the end of the round.
            parameters: the global parameters at the beginning of the turn.

        Returns:
            Whether there are such transformations.
        """
        if self._of_sender:
            transform_delta(self._of_sender, delta, arrival, snapshot, parameters, self._default_buffer_size)
        return bool(self._of_sender)

    def transform(self, pseudo_gradient: Tensor, arrivals: Sequence[Arrival]) -> bool:
        """Apply the transformations of all replicas to a pseudo-gradient, in place.

        Args:
            pseudo_gradient: the pseudo-gradient, in the parameters' shape.
            arrivals: workers and stalenesses of the deltas that it is made of.

        Returns:
            Whether it is to move the parameters now.
        """
        first = len(self._of_sender)
        context = Context(arrivals, self._parameters, None, self._default_buffer_size)
        transformed: Tensor | None = pseudo_gradient
        for transform, state in zip(self.transforms[first:], self._states[first:], strict=True):
            assert transformed is not None
            transformed = transform.update(transformed, state, context)
            if transformed is None:
                return False
        if transformed is not pseudo_gradient:
            assert transformed is not None
            pseudo_gradient.copy_(transformed)
        return True

    def state_dict(self) -> list[dict[str, Any]]:
        """Copies of the states, with the names of their transformations."""
        return [
            {"name": type(transform).__qualname__, "state": deepcopy(state)}
            for transform, state in zip(self.transforms, self._states, strict=True)
        ]

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]], own_copy: Callable[[Any], Any]) -> list[str]:
        """Go on from saved states. A transformation that was another one in its place begins anew.

        Args:
            saved: a result of :meth:`state_dict`.
            own_copy: copies a value to the device of the parameters.

        Returns:
            The difference from the chain of then, in one line, if there is one.
        """
        self._states = self._initial_states()
        now, then = [type(transform).__qualname__ for transform in self.transforms], [state["name"] for state in saved]
        for own, name, state in zip(self._states, now, saved, strict=False):
            if state["name"] == name:
                own |= {key: own_copy(value) for key, value in state["state"].items()}
        return [] if now == then else [f"`transforms` were {then} and are {now}: those in other places begin anew"]

    def _initial_states(self) -> list[dict[str, Any]]:
        return [transform.init(self._parameters) for transform in self.transforms]
