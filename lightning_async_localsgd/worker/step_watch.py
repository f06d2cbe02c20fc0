"""Detection of local steps: a step of an optimizer, or a change of the parameters without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["ParameterChanges", "StepListener", "StepWatch"]


class StepListener:
    """Calls a function after every step of an optimizer.

    Only the outermost call of ``step`` counts: a subclass may call ``super().step()``, and a wrapper calls its inner
    optimizer's. The method is replaced on the object, as torch's schedulers do, because wrappers that do not call
    ``Optimizer.__init__`` have no step hooks.

    Args:
        optimizer: the optimizer, until :meth:`close`.
        on_step: called with True if the step was made, and False if a gradient scaler made a fused optimizer skip it.
    """

    def __init__(self, optimizer: Optimizer, on_step: Callable[[bool], None]) -> None:
        self._optimizer = optimizer
        self._on_step: Callable[[bool], None] | None = on_step
        self._before = vars(optimizer).get("step")
        self._skipped = False
        # The scaler resets its skip flag when the innermost optimizer has stepped: only a hook can read it before that.
        has_hooks = hasattr(optimizer, "_optimizer_step_post_hooks")
        self._hook = optimizer.register_step_post_hook(self._look) if has_hooks else None
        inner = optimizer.step

        @wraps(getattr(inner, "__func__", inner))
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self._skipped = False
            output = inner(*args, **kwargs)
            if self._on_step is not None:
                if self._hook is None:
                    self._look(optimizer)
                self._on_step(not self._skipped)
            return output

        self._step = MethodType(step, optimizer)  # later schedulers expect a method
        optimizer.step = self._step  # type: ignore[method-assign]

    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        self._skipped = self._skipped or (skipped is not None and bool(skipped.item()))

    def close(self) -> None:
        """Restore the optimizer."""
        self._on_step = None
        if self._hook is not None:
            self._hook.remove()
        if vars(self._optimizer).get("step") is not self._step:
            return  # the method has been replaced once more, and the new one calls this one
        del self._optimizer.step
        if self._before is not None:
            self._optimizer.step = self._before  # type: ignore[method-assign]


class ParameterChanges:
    """Detects changes of the trainable parameters of a module.

    Every write to a tensor increments its version, which costs nothing to read. Writes through ``parameter.data`` and
    replayed CUDA graphs do not. A sum of all bits detects these, at the cost of a pass over the parameters.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = list(_trainable(module))
        self.settle(bits=True)

    def settle(self, bits: bool) -> None:
        """Take the current parameters as unchanged.

        Args:
            bits: whether the next :meth:`found` is to detect changes that leave no version.
        """
        self._versions = self._sum_of_versions()
        if bits:
            self._bits = _sum_of_bits(_trainable(self._module))

    def found(self, bits: bool) -> bool:
        """Whether the parameters have changed since :meth:`settle`."""
        return self._sum_of_versions() != self._versions or (
            bits and not torch.equal(_sum_of_bits(_trainable(self._module)), self._bits)
        )

    def _sum_of_versions(self) -> int:
        return sum(parameter._version for parameter in self._parameters)


class StepWatch:
    """Detects the batches that were local steps of a worker.

    As long as optimizers step, only their steps are counted. A batch without an optimizer's step is also a local step
    if the parameters have changed: by an optimizer of the module's own, by another method than ``step`` (manual
    sharpness-aware minimization), or by direct writes.

    Args:
        module: the module to train.
        optimizers: its optimizers.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._listeners: list[StepListener] = []
        self._changes = ParameterChanges(module)
        self._heard = False  # an optimizer's `step` was called
        self._stepped = False
        self._unseen = True  # neither optimizers nor tensor versions have shown a step so far
        self.watch(optimizers)

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Listen to these optimizers instead of the previous ones."""
        self.close()
        self._listeners = [StepListener(optimizer, self._hear) for optimizer in optimizers]

    def _hear(self, made: bool) -> None:
        self._heard = True
        self._unseen = False
        self._stepped |= made

    def take(self, accumulating: bool = False) -> bool:
        """Whether a local step was made since the last call.

        Args:
            accumulating: whether gradients are known to be accumulated; then only an optimizer's step counts.
        """
        changed = not self._heard and not accumulating and self._changes.found(self._unseen)
        made = self._stepped or changed
        self._heard = self._stepped = False
        return made

    def settle(self) -> None:
        """Ignore changes of the parameters since the last step: an adoption or validation is no training."""
        self._changes.settle(self._unseen)

    def restart(self) -> None:
        """Forget all steps and changes so far."""
        self._heard = self._stepped = False
        self._unseen = True
        self.settle()

    def close(self) -> None:
        """Restore the optimizers."""
        for listener in reversed(self._listeners):
            listener.close()
        self._listeners = []


def _trainable(module: nn.Module) -> Iterable[Tensor]:
    return (parameter for parameter in module.parameters() if parameter.requires_grad)


@torch.no_grad()
def _sum_of_bits(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the bits, as integers, on the device of the first tensor."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [t.contiguous().view(-1).view(kinds[min(8, t.element_size())]).sum() for t in tensors if t.numel() > 0]
    return torch.stack([s.to(sums[0].device) for s in sums]).sum() if sums else torch.zeros(())
