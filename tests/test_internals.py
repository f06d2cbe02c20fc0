"""What the library needs of Lightning's private names is there, in the form that it needs.

A failure names the one that a release of Lightning has changed, and the files that depend on it.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_async_localsgd
from tests.modules import Regression, regression_data

ROOT = Path(lightning_async_localsgd.__file__).parent
TEXTS = {str(file.relative_to(ROOT)): file.read_text() for file in ROOT.rglob("*.py") if file.name != "internals.py"}
SOURCE = ast.parse((ROOT / "internals.py").read_text())
IMPORTED = {
    alias.asname: (node.module, alias.name)
    for node in SOURCE.body
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning")
    for alias in node.names
    if alias.asname is not None
}
FUNCTIONS = [node.name for node in SOURCE.body if isinstance(node, ast.FunctionDef)]


def users(name: str) -> list[str]:
    return sorted(file for file, text in TEXTS.items() if name in text)


# ---- what is imported ------------------------------------------------------------------------------------------------


PARAMETERS: dict[str, tuple[str, ...]] = {
    "BackwardSyncControl.no_backward_sync": ("module", "enabled"),
    "MultiProcessingLauncher.get_extra_results": ("trainer",),
    "MultiProcessingLauncher.launch": ("function", "args", "trainer", "kwargs"),
    "MultiProcessingLauncher.update_main_process_results": ("trainer", "extra"),
    "SubprocessScriptLauncher.__init__": ("cluster_environment", "num_processes", "num_nodes"),
    "SubprocessScriptLauncher.launch": ("function", "args", "trainer", "kwargs"),
    "TrainingEpochLoop.update_lr_schedulers": ("interval", "update_plateau_schedulers"),
    "WrappingCheckpointIO.__init__": ("checkpoint_io",),
    "auto_add_worker_init_fn": ("dataloader", "rank"),
    "call_lightning_module_hook": ("trainer", "hook_name", "args", "pl_module", "kwargs"),
    "call_strategy_hook": ("trainer", "hook_name", "args", "kwargs"),
    "check_loader_workers": ("trainer", "dataloader", "name"),
    "extract_batch_sizes": ("batch",),
    "get_distributed_sampler": ("dataloader", "shuffle", "overfit_batches", "mode", "kwargs"),
    "init_optimizers_and_lr_schedulers": ("model",),
    "is_dataloader_shuffled": ("dataloader",),
    "request_dataloader": ("data_source",),
    "set_sampler_epoch": ("dataloader", "epoch"),
    "update_dataloader": ("dataloader", "sampler", "mode"),
}


def resolve(alias: str) -> Any:
    module, name = IMPORTED[alias]
    assert module is not None
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        pytest.fail(f"Lightning {L.__version__} has no {module}.{name}, which {users(alias)} need")


@pytest.mark.parametrize("alias", IMPORTED)
def test_what_is_imported_exists_and_is_used(alias: str) -> None:
    resolve(alias)
    assert users(alias) or alias in ("call_strategy_hook",), f"nobody needs {alias} any more"


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_what_is_called_or_overridden_takes_the_same_arguments(name: str, expected: tuple[str, ...]) -> None:
    alias, _, method = name.partition(".")
    target = resolve(alias)
    found = tuple(p for p in inspect.signature(getattr(target, method) if method else target).parameters if p != "self")
    assert found == expected, f"{name} of Lightning {L.__version__} takes {found}, and {users(alias)} expect {expected}"


# ---- what is looked up on the trainer and its loops ------------------------------------------------------------------


class Probe(L.Callback):
    """Calls every function of the file once, at the end of the first batch."""

    def __init__(self) -> None:
        self.wrong: dict[str, str | None] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        from lightning_async_localsgd import internals

        if batch_idx > 0:
            return
        arguments: dict[str, Callable[[], tuple[Any, ...]]] = {
            "build_step_arguments": lambda: (trainer, batch, batch_idx),
            "current_hook": lambda: (pl_module,),
            "fetched_loaders": lambda: (internals.data_fetcher(trainer),),
            "has_trainer": lambda: (pl_module,),
            "prepare_batch": lambda: (trainer, batch),
            "set_logged_metrics": lambda: (trainer, {"mine": torch.tensor(1.0)}),
        }
        for name in FUNCTIONS:
            try:
                found = getattr(internals, name)(*arguments.get(name, lambda: (trainer,))())
                self.wrong[name] = None if EXPECTED[name](found) else f"gives {found!r}"
            except Exception as error:
                self.wrong[name] = f"raises {error!r}"


EXPECTED: dict[str, Callable[[Any], bool]] = {
    "batches_that_stepped": lambda found: found == 0,
    "build_step_arguments": lambda found: list(found) == ["batch", "batch_idx"],
    "can_stop_early": lambda found: found is True,
    "current_hook": lambda found: found == "on_train_batch_end",
    "data_fetcher": lambda found: found.length == 4 and found.fetched >= 1 and hasattr(found, "iterator"),
    "dump_checkpoint": lambda found: {"state_dict", "optimizer_states", "loops"} <= set(found),
    "epoch_over": lambda found: found is False,
    "fetched_loaders": lambda found: len(found.flattened) == 1,
    "has_trainer": lambda found: found is True,
    "logged_metrics": lambda found: isinstance(found, dict),
    "prepare_batch": lambda found: len(found) == 3,
    "set_logged_metrics": lambda found: found is None,
    "should_accumulate": lambda found: found is False,
    "should_update_logs": lambda found: found is True,
    "training_loaders": lambda found: len(found.flattened) == 1,
    "validation_source": lambda found: found.is_defined() is False,
}


@pytest.fixture(scope="module")
def probed() -> tuple[dict[str, str | None], dict[str, Any]]:
    probe, trainer = Probe(), make_trainer()
    trainer.callbacks.append(probe)  # type: ignore[attr-defined]
    seen: dict[str, Any] = {}
    probe.on_train_end = lambda trainer, _: seen.update(trainer.callback_metrics)  # type: ignore[method-assign]
    trainer.fit(Regression(), DataLoader(regression_data(32), batch_size=8))
    return probe.wrong, seen


def make_trainer() -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=1, **quiet)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_looked_up_is_there(name: str, probed: tuple[dict[str, str | None], dict[str, Any]]) -> None:
    wrong = probed[0][name]
    assert wrong is None, f"{name} {wrong} with Lightning {L.__version__}, and {users(name)} need it"
    assert users(name), f"nobody needs {name} any more"


def test_metrics_that_are_put_in_the_place_of_lightnings_are_what_callbacks_see(
    probed: tuple[dict[str, str | None], dict[str, Any]],
) -> None:
    assert "mine" in probed[1]


def test_a_checkpoint_callback_has_what_its_state_leaves_out() -> None:
    from lightning_async_localsgd.internals import LAST_SAVED

    assert set(LAST_SAVED) <= set(vars(L.pytorch.callbacks.ModelCheckpoint()))


# ---- what subclasses inherit -----------------------------------------------------------------------------------------


def own_names(kind: type) -> set[str]:
    """Private names that a class uses on itself, or defines."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    names |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def subclasses() -> Iterator[type]:
    """Classes of the library that derive from one of Lightning's."""
    for module in pkgutil.walk_packages([str(ROOT)], "lightning_async_localsgd."):
        if module.name.split(".")[1] in ("__main__", "pytorch_lightning", "cli"):
            continue
        for kind in vars(import_module(module.name)).values():
            if inspect.isclass(kind) and kind.__module__ == module.name and bases_in_lightning(kind):
                yield kind


def bases_in_lightning(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if base.__module__.startswith("lightning.")]


def test_what_subclasses_inherit_is_there_and_no_name_of_lightnings_is_taken_unawares() -> None:
    from lightning_async_localsgd.internals import INHERITED

    found: dict[str, set[str]] = {}
    for kind in subclasses():
        names = own_names(kind)
        for base in bases_in_lightning(kind):
            for name in names & own_names(base):
                found.setdefault(name, set()).update(f"{b.__module__}.{b.__qualname__}" for b in [base])
    for owner, names in INHERITED.items():
        for name in names:
            assert owner in found.get(name, ()), (
                f"{owner}.{name} is gone from Lightning {L.__version__}, and {users(name)} need it (or nobody does any "
                "more)"
            )
    listed = {name for names in INHERITED.values() for name in names}
    assert set(found) <= listed, "these are Lightning's own: list them in `INHERITED`, or choose another name"
