"""Has an object of Lightning's or the user's behave otherwise for a while: a class is mixed into the object's own."""

from __future__ import annotations

import copyreg
from typing import Any

__all__ = ["mix_in", "mix_out"]


class _Mixed:
    """Marks an object into whose class another one is mixed."""

    plain: type
    """The object's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy, or a pickle, is of the object's own class: outside of this job it behaves as ever."""
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

    The object stays the one that others hold and stays an instance of its own class, under its own name.

    Args:
        target: the object.
        mixin: overrides some of its methods, and calls ``super()`` where it goes on as ever.
        **attributes: what the mixin needs to know. It lies in the new class, so that neither ``vars(target)`` nor a
            state that is made of that shows it.
    """
    plain = type(target)
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    bases = (mixin, plain) if issubclass(plain, _Mixed) else (mixin, _Mixed, plain)
    target.__class__ = type(plain.__name__, bases, {**names, **attributes, "plain": plain})


def mix_out(target: Any) -> None:
    """Take out the class that was mixed in last."""
    if isinstance(target, _Mixed):
        target.__class__ = target.plain
