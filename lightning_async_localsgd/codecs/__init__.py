"""Codecs: how a delta is written on the wire."""

from lightning_async_localsgd.codecs.base import Codec, codecs_by_name, make_codec
from lightning_async_localsgd.codecs.floats import BF16, FP32

__all__ = ["BF16", "FP32", "Codec", "codecs_by_name", "make_codec"]
