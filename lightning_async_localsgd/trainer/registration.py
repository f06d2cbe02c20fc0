"""The strategy under names of one's own, for what takes a strategy by its name alone."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_async_localsgd.trainer.strategy import AsyncLocalSGDStrategy

__all__ = ["register_strategy"]


def register_strategy(name: str, **settings: Any) -> None:
    """Give the strategy with these settings a name, which ``Trainer(strategy=name)`` takes from then on.

    For configuration files and command lines that hand over a name only. Each ``Trainer`` gets a strategy of its own.
    A name that was given before is given anew.

    Example::

        register_strategy("two_sites", local_steps=200, codec="bf16")
        trainer = L.Trainer(devices=2, strategy="two_sites")

    Args:
        name: the name, in lower case, for ``Trainer`` looks for it so.
        **settings: arguments of :class:`~lightning_async_localsgd.AsyncLocalSGDStrategy`. What is an object, such as
            ``pace`` or ``transforms``, all strategies of the name share.

    Raises:
        ValueError: if Lightning has a strategy of this name, the name is not in lower case, or a setting is outside its
            range.
        TypeError: if there is no such setting.
    """
    if name != name.lower():
        raise ValueError(
            f"`Trainer` looks for strategies in lower case: register {name.lower()!r} instead of {name!r}."
        )
    known = StrategyRegistry[name]["strategy"] if name in StrategyRegistry else AsyncLocalSGDStrategy
    if name == "auto" or known is not AsyncLocalSGDStrategy:
        raise ValueError(f"{name!r} is the name of another strategy: choose one that is not in use.")
    AsyncLocalSGDStrategy(**settings)  # its own checks speak here, and not when a Trainer is made
    StrategyRegistry.register(
        name, AsyncLocalSGDStrategy, description="Asynchronous Local-SGD", override=True, **settings
    )
