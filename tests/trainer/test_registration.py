"""The strategy by names of one's own, as configuration files hand them over."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.strategies import StrategyRegistry

from lightning_async_localsgd import AsyncLocalSGDStrategy, register_strategy
from tests.imports import run


def make_trainer(strategy: str) -> L.Trainer:
    """As a library does that accepts nothing but a name."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", devices=2, strategy=strategy, **quiet)


def test_a_name_stands_for_its_settings() -> None:
    register_strategy("two_sites", local_steps=200, codec="bf16")
    first, second = (make_trainer("two_sites").strategy for _ in range(2))
    assert isinstance(first, AsyncLocalSGDStrategy) and first is not second
    assert (first.settings.local_steps, first.settings.codec) == (200, "bf16")
    register_strategy("two_sites", local_steps=30)  # a notebook's cell is run again
    again = make_trainer("two_sites").strategy
    assert isinstance(again, AsyncLocalSGDStrategy) and again.settings.local_steps == 30
    assert "two_sites" in StrategyRegistry.available_strategies()


USE = """
for suffix in ("", "_fork", "_notebook", "_spawn"):
    strategy = L.Trainer(accelerator="cpu", devices=2, logger=False, strategy="async_localsgd" + suffix).strategy
    assert type(strategy) is lightning_async_localsgd.AsyncLocalSGDStrategy
assert strategy._start_method == "spawn"
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import lightning as L, lightning_async_localsgd",
        "import lightning_async_localsgd, lightning as L",
        "import lightning_async_localsgd, lightning.pytorch as L",
        "import lightning_async_localsgd; lightning_async_localsgd.AsyncLocalSGDStrategy; import lightning as L",
        "from lightning_async_localsgd.trainer.strategy import AsyncLocalSGDStrategy; import lightning_async_localsgd\n"
        "import lightning as L",
        "import lightning_async_localsgd.pytorch_lightning, pytorch_lightning as L",
        "import lightning_async_localsgd, importlib.util; importlib.util.find_spec('lightning.pytorch.strategies')\n"
        "import lightning as L",
    ],
)
def test_the_names_are_known_whichever_package_is_imported_first(imports: str) -> None:
    code, output = run(imports + USE)
    assert code == 0, output


def test_the_package_alone_does_not_import_torch() -> None:
    code = "import lightning_async_localsgd, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "settings", "error", "said"),
    [
        ("ddp", {}, ValueError, "name of another strategy"),
        ("auto", {}, ValueError, "name of another strategy"),
        ("TwoSites", {}, ValueError, "register 'twosites'"),
        ("mine", {"local_steps": 0}, ValueError, "`local_steps` must be a whole number"),
        ("mine", {"local_step": 10}, TypeError, "local_step"),
    ],
)
def test_what_no_trainer_could_use_is_refused_at_once(
    name: str, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=re.escape(said)):
        register_strategy(name, **settings)
    assert "mine" not in StrategyRegistry
