"""An object into which a class is mixed stays the object it was."""

from __future__ import annotations

import copy
import pickle

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async_localsgd.trainer.mixing import mix_in, mix_out


class Louder:
    """Mixed in."""

    by: int

    def __str__(self) -> str:
        return super().__str__().upper() + "!" * self.by


class Plain:
    def __init__(self) -> None:
        self.words = ["quiet"]

    def __str__(self) -> str:
        return self.words[0]


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_is_of_the_objects_own_class(again: object) -> None:
    plain = Plain()
    mix_in(plain, Louder, by=2)
    assert str(plain) == "QUIET!!" and isinstance(plain, Plain)
    assert vars(plain) == {"words": ["quiet"]}  # a state made of it holds nothing else
    twin = again(plain)  # type: ignore[operator]
    assert type(twin) is Plain and str(twin) == "quiet"
    mix_out(plain)
    assert type(plain) is Plain


def test_lightning_knows_a_callback_by_the_same_key() -> None:
    callback = ModelCheckpoint(monitor="loss")
    key = callback.state_key
    mix_in(callback, Louder, by=1)
    assert callback.state_key == key
