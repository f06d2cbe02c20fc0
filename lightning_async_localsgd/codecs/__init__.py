"""Codecs: how a delta is written on the wire."""

from lightning_async_localsgd.codecs.base import Codec, codecs_by_name, make_codec
from lightning_async_localsgd.codecs.blocks import E3M0, INT4, INT8
from lightning_async_localsgd.codecs.feedback import ErrorFeedback
from lightning_async_localsgd.codecs.floats import BF16, FP32
from lightning_async_localsgd.codecs.topk import TopK

__all__ = ["BF16", "E3M0", "FP32", "INT4", "INT8", "Codec", "ErrorFeedback", "TopK", "codecs_by_name", "make_codec"]
