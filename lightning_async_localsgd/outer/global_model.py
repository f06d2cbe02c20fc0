"""The global model: the global state of every fragment, which move independently of each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_async_localsgd.outer.layout import Layout
from lightning_async_localsgd.outer.state import GlobalState, check_tensors

__all__ = ["GlobalModel"]

_BITS = 64


class GlobalModel:
    """Global parameters and float buffers of a whole model: a :class:`GlobalState` for each fragment of its layout.

    Each fragment has an outer optimizer and a version of its own, and an outer update moves one of them. They share one
    flat vector, and memory for the pseudo-gradient of one of them.

    Args:
        layout: where each tensor lies in the flat vector, and the fragments.
        make_state: makes the state of a fragment, as :class:`GlobalState` does, from the fragment and the arguments
            ``flat`` and ``pseudo_gradient``.
        device: where the state lives.

    References:
        Douillard et al. 2025, Streaming DiLoCo (arXiv 2501.18512), Algorithm 2.
    """

    def __init__(
        self,
        layout: Layout,
        make_state: Callable[..., GlobalState] = GlobalState,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout
        self.flat = layout.empty(device)
        """Global parameters, then global buffers: fp32, shape ``(layout.numel,)``."""
        pseudo_gradient = torch.zeros(max(part.numel for part in layout.fragments), device=device)
        self.fragments = [
            make_state(part, flat=self.flat[part.span], pseudo_gradient=pseudo_gradient[: part.numel])
            for part in layout.fragments
        ]
        """The state of each fragment. Only one at a time can have a pseudo-gradient."""
        self._checksums: dict[int, tuple[int, int]] = {}  # of each fragment: a version, and the checksum at it

    @property
    def version(self) -> int:
        """Number of outer updates so far, of all fragments."""
        return sum(self.versions)

    @property
    def versions(self) -> tuple[int, ...]:
        """Number of outer updates so far, of each fragment."""
        return tuple(state.version for state in self.fragments)

    @property
    def sums(self) -> bool:
        """Whether deltas are added up on their way."""
        return self.fragments[0].sums

    def begin(self, tensors: Sequence[Tensor]) -> list[str]:
        """Begin from these tensors, in the order of the layout's slots; see :meth:`GlobalState.begin`."""
        self._checksums.clear()
        return [name for state in self.fragments for name in state.begin(tensors[state.layout.members])]

    def set_workers(self, workers: int) -> None:
        """Tell how many workers take part from here on."""
        for state in self.fragments:
            state.set_workers(workers)

    def set_round_length(self, local_steps: int) -> None:
        """Tell H, local steps per round of the fastest worker, from here on."""
        for state in self.fragments:
            state.set_round_length(local_steps)

    def checksum(self) -> int:
        """Checksum of all fragments, as a signed 64-bit integer; those that have not moved are not read again."""
        for i, state in enumerate(self.fragments):
            if i not in self._checksums or self._checksums[i][0] != state.version:
                self._checksums[i] = state.version, state.checksum()
        total = sum(checksum for _, checksum in self._checksums.values()) % (1 << _BITS)
        return total - (1 << _BITS) if total >> (_BITS - 1) else total

    def digest(self) -> str:
        """Hash (hex) of all fragments; see :meth:`GlobalState.digest`."""
        digests = [state.digest() for state in self.fragments]
        if len(digests) == 1:
            return digests[0]
        return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the global parameters and buffers, by name, on the CPU."""
        return {name: tensor for state in self.fragments for name, tensor in state.tensors().items()}

    @torch.no_grad()
    def state_dict(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Version, global parameters and buffers by name, state of outer optimizers and transformations; all copies.

        Args:
            tensors: where to copy parameters and buffers, as :meth:`tensors` gave them; None: new tensors.
        """
        copies = dict(tensors) if tensors else {}
        own = [{slot.name: copies[slot.name] for slot in state.layout.slots if copies} for state in self.fragments]
        parts = [state.state_dict(into) for state, into in zip(self.fragments, own, strict=True)]
        if len(parts) == 1:
            return parts[0]
        merged = {name: tensor for part in parts for name, tensor in part.pop("tensors").items()}
        return {"version": self.version, "tensors": merged, "fragments": parts}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Take over a state saved by :meth:`state_dict`; see :meth:`GlobalState.load_state_dict`.

        Raises:
            ValueError: if it belongs to another model, to another number of fragments, or to an outer optimizer with
                other parameter groups. In the first two cases nothing is changed.
        """
        self._checksums.clear()
        tensors, parts = state_dict["tensors"], state_dict.get("fragments", [state_dict])
        check_tensors(self.layout, tensors)
        if len(parts) != len(self.fragments):
            raise ValueError(
                f"The saved state has {len(parts)} fragments, each with an outer optimizer of its own. Go on with "
                f"`fragments={len(parts)}`, or begin anew from what `load_from_checkpoint` gives."
            )
        differences: list[str] = []
        for state, part in zip(self.fragments, parts, strict=True):
            own = {slot.name: tensors[slot.name] for slot in state.layout.slots}
            differences += state.load_state_dict({**part, "tensors": own})
        return list(dict.fromkeys(differences))
