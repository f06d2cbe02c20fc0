"""The local steps of a loop: how they are told from what else changes parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_async_localsgd.worker.step_watch import ParameterChanges, StepListener

__all__ = ["LoopSteps", "check_parameters"]


class LoopSteps:
    """Tells the local steps of a loop: those of the last optimizer, and changes of the parameters past all of them.

    Args:
        module: the module that is trained.
        optimizers: its optimizers, until :meth:`close`.
        on_step: called after each local step.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer], on_step: Callable[[], None]) -> None:
        self._on_step = on_step
        *others, last = optimizers
        self._listeners = [*(StepListener(o, self.hear) for o in others), StepListener(last, self._after_step)]
        self._changes = ParameterChanges(module)
        self._heard = False  # a step of an optimizer, in this run
        self._seen = False  # a step of an optimizer, since the parameters were settled

    def hear(self, made: bool = True) -> None:
        """An optimizer has stepped."""
        self._heard = self._seen = True

    def _after_step(self, made: bool) -> None:
        self.hear()
        if made:  # else a gradient scaler has had it skipped
            self._on_step()

    def look_for_change(self) -> None:
        """Take a change of the parameters in which no optimizer has stepped for a local step."""
        if not self._seen and self._changes.found(bits=not self._heard):
            self._on_step()
        self.settle()

    def settle(self) -> None:
        """What has changed the parameters until now was no training, or is counted."""
        self._seen = False
        self._changes.settle(bits=not self._heard)

    def close(self) -> None:
        """Leave the optimizers as they were."""
        for listener in reversed(self._listeners):
            listener.close()


def check_parameters(module: nn.Module, optimizers: tuple[Optimizer, ...]) -> None:
    """Refuse what is no optimizer, and optimizers of parameters outside the module: these would not be exchanged."""
    if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise TypeError("Pass the module and then its optimizers: `AsyncLocalSGD(module, optimizer, ...)`.")
    exchanged = {id(parameter) for parameter in module.parameters()}
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            if not all(id(parameter) in exchanged for parameter in group["params"]):
                raise ValueError(
                    f"Optimizer {index} ({type(optimizer).__name__}) trains parameters that the module does not have: "
                    "they would not be exchanged. Pass a module that holds all, for instance "
                    "`nn.ModuleList([generator, discriminator])`."
                )
