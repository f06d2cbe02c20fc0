"""Temporary changes of the behaviour of single objects: a mixin is put before an object's own class."""

from __future__ import annotations

import copyreg
from typing import Any

__all__ = ["mix_in", "mix_out"]


class _Mixed:
    """Marks an object with a mixin."""

    plain: type
    """The object's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle as an object of its own class, without the mixin."""
        mixed, self.__class__ = type(self), self.plain
        try:
            make, *rest = self.__reduce_ex__(protocol)
        finally:
            self.__class__ = mixed
        return (_new if make is copyreg.__newobj__ else make, *rest)  # type: ignore[attr-defined]  # pickle checks it


def _new(plain: Any, *args: Any) -> Any:
    return plain.__new__(plain, *args)


def mix_in(target: Any, mixin: type, **attributes: Any) -> None:
    """Put ``mixin`` before the class of ``target``, until :func:`mix_out`.

    The object keeps its identity, and remains an instance of its own class, under its own name.

    Args:
        target: the object.
        mixin: overrides some of its methods, and calls ``super()`` for the usual behaviour.
        **attributes: attributes for the mixin. They are set on the new class, so that neither ``vars(target)`` nor a
            state made from it contains them.
    """
    plain = type(target)
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    bases = (mixin, plain) if issubclass(plain, _Mixed) else (mixin, _Mixed, plain)
    target.__class__ = type(plain.__name__, bases, {**names, **attributes, "plain": plain})


def mix_out(target: Any) -> None:
    """Remove the mixin that was added last."""
    if isinstance(target, _Mixed):
        target.__class__ = target.plain
