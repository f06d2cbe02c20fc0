"""Deltas that cannot be sent: a warning for each, and an error after several in a row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightning_async_localsgd.errors import NotFiniteError
from lightning_async_localsgd.outer import Unsendable
from lightning_async_localsgd.outer.layout import Layout

__all__ = ["Drops"]

_MOST_IN_A_ROW = 5
_NAMED = 5  # maximum number of tensors named in a message


class Drops:
    """Watches for deltas of one worker that could not be sent, or not as a whole.

    Args:
        worker: name of the worker in messages.
        layout: the layout of its module.
    """

    def __init__(self, worker: str, layout: Layout) -> None:
        self._worker = worker
        self._layout = layout
        self._in_a_row = 0
        self._named_buffers: set[str] = set()

    def look(self, fragment: int, unsendable: Unsendable) -> None:
        """Warn of a dropped delta of a fragment, and once of each buffer that was left out of a delta.

        Raises:
            NotFiniteError: at the fifth dropped delta in a row.
        """
        if unsendable.parameters:
            self._dropped(unsendable.parameters)
            return
        self._in_a_row = 0
        slots = self._layout.fragments[fragment].slots
        names = [slots[index].name for index in unsendable.buffers]
        new = [name for name in names if name not in self._named_buffers]
        if new:
            self._named_buffers.update(new)
            warnings.warn(
                f"{self._worker} leaves {_list(new)} out of its deltas "
                "while it is not finite, or not of the shape it had when training started, and takes the global values "
                "over. If it is no statistic to be averaged, name it in `local_buffers`.",
                stacklevel=4,
            )

    def _dropped(self, parameters: Sequence[str]) -> None:
        self._in_a_row += 1
        if self._in_a_row == _MOST_IN_A_ROW:
            raise NotFiniteError(
                f"{self._worker} has dropped {_MOST_IN_A_ROW} deltas in a row, so it learns nothing: "
                f"{_list(parameters)} had NaN or infinite elements at the end of each round. Look for the step that "
                "makes them so (its data, its loss; `torch.autograd.set_detect_anomaly(True)` finds the operation), or "
                "lower the learning rate."
            )
        warnings.warn(
            f"A delta of {self._worker} has been dropped: {_list(parameters)} had NaN or infinite elements at the end "
            "of the round. It starts again from the global parameters. Look at its data and its loss, or lower the "
            "learning rate.",
            stacklevel=4,
        )


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
