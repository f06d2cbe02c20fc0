"""The interface of a codec, and the codecs by name."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Codec", "codecs_by_name", "make_codec"]


@runtime_checkable
class Codec(Protocol):
    """Writes chunks of a flat fp32 vector as bytes and reads them back.

    Every worker applies decoded values, the encoding worker included, so that all apply the same numbers. Decoding is
    bit-identical on every machine: each decoded value is exact in fp32. Encoding may depend on the machine. Inputs are
    finite and of magnitude at most :attr:`largest`.
    """

    @property
    def name(self) -> str:
        """Name in the settings."""

    @property
    def block(self) -> int:
        """Number of elements that are written together.

        Chunks of a vector begin at multiples of it. All chunks but the last have a multiple of it as their length. The
        decoded values are then independent of how the vector was cut.
        """

    @property
    def largest(self) -> float:
        """The largest magnitude that survives the wire; a delta beyond it counts as non-finite."""

    @property
    def lossless(self) -> bool:
        """Whether the decoded values equal the encoded ones: no residual is needed."""

    @property
    def error_decay(self) -> float:
        """Part, from 0 to 1, of what was not sent so far that is added to the next delta; 1: nothing is lost."""

    def of_sum(self, count: int) -> Codec:
        """The codec of the sum of ``count`` deltas that were written by this one.

        A sum may need more than a delta does. Of one delta it is this codec itself, so that its bytes can be passed on.
        ``block`` is a multiple of that of the result.
        """

    def wire_bytes(self, numel: int) -> int:
        """Size in bytes of the wire form of ``numel`` elements, scales included."""

    def encode(self, chunk: Tensor, out: Tensor | None = None) -> Tensor:
        """The wire form of a chunk.

        Args:
            chunk: fp32, shape ``(n,)``, contiguous.
            out: uint8, shape ``(wire_bytes(n),)``, on the device of ``chunk``: written instead of a new tensor.

        Returns:
            ``out``, or a uint8 tensor of its shape; it may be a view of ``chunk``.
        """

    def decode(self, wire: Tensor, out: Tensor, add: bool = False) -> None:
        """Write the decoded values to ``out``, or add them to it.

        Args:
            wire: uint8, shape ``(wire_bytes(n),)``, contiguous.
            out: fp32, shape ``(n,)``, contiguous, on the device of ``wire``.
            add: add to ``out``, with one rounding per element.
        """


def codecs_by_name() -> dict[str, Codec]:
    """All codecs that have a name, with their default parameters."""
    from lightning_async_localsgd.codecs.blocks import E3M0, INT4, INT8
    from lightning_async_localsgd.codecs.floats import BF16, FP32
    from lightning_async_localsgd.codecs.topk import TopK

    codecs: tuple[Codec, ...] = (FP32(), BF16(), INT8(), INT4(), E3M0(), TopK())
    return {codec.name: codec for codec in codecs}


def make_codec(codec: str | Codec) -> Codec:
    """The codec of this name, or the codec object itself.

    Raises:
        ValueError: if ``codec`` is neither a known name nor an object with the members of :class:`Codec`.
    """
    known = codecs_by_name()
    if isinstance(codec, str):
        if codec in known:
            return known[codec]
    elif isinstance(codec, Codec):
        return codec
    raise ValueError(
        f"`codec` must be one of {sorted(known)} or an object with the members of "
        f"`lightning_async_localsgd.codecs.Codec`, got {codec!r}."
    )
