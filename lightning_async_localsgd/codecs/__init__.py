"""Codecs: how a delta is written on the wire."""

from lightning_async_localsgd.codecs.base import Codec, codecs_by_name, make_codec
from lightning_async_localsgd.codecs.blocks import INT4, INT8
from lightning_async_localsgd.codecs.feedback import ErrorFeedback
from lightning_async_localsgd.codecs.floats import BF16, FP32

__all__ = ["BF16", "FP32", "INT4", "INT8", "Codec", "ErrorFeedback", "codecs_by_name", "make_codec"]
