"""Embedding codecs: how a (B, D) array of floats is packed into rows of fixed width, and read back.

- float32, float16: little-endian IEEE values, 4 or 2 bytes each; float16 overflows to +-65504, never to infinity.
- int8: one float32 scale per row (max |x| / 127, little-endian), then D signed bytes; x = scale * q.
- int4: q = clamp(round(8 x), -8, 7) for x in [-1, 1], two values a byte, the even index in the low nibble, offset by 8;
  x = q / 8. Source: LoopFM (arXiv 2605.29280), whose tanh bottleneck gives values in [-1, 1].
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Codec = Literal["float32", "float16", "int8", "int4"]
CODECS: tuple[Codec, ...] = get_args(Codec)
FLOAT16_MAX = 65504.0


def encoded_width(size: int, codec: Codec) -> int:
    """Give the bytes of one row of `size` values."""
    return {"float32": 4 * size, "float16": 2 * size, "int8": 4 + size, "int4": (size + 1) // 2}[codec]


def encode(values_BD: NDArray[np.float32], codec: Codec) -> NDArray[np.uint8]:  # noqa: N803
    """Pack finite (B, D) float32 values into (B, encoded_width) bytes."""
    values = np.ascontiguousarray(values_BD, dtype="<f4")
    rows, size = values.shape
    if codec == "float32":
        return values.view(np.uint8).reshape(rows, 4 * size)
    if codec == "float16":
        clipped = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype("<f2")
        return clipped.view(np.uint8).reshape(rows, 2 * size)
    if codec == "int8":
        scale = (np.abs(values).max(axis=1, initial=0.0) / 127).astype("<f4")
        safe = np.where(scale > 0, scale, np.float32(1))
        quantised = np.clip(np.rint(values / safe[:, None]), -127, 127).astype(np.int8)
        return np.concatenate([scale.reshape(rows, 1).view(np.uint8), quantised.view(np.uint8)], axis=1)
    nibbles = (np.clip(np.rint(values * 8), -8, 7) + 8).astype(np.uint8)
    if size % 2:
        nibbles = np.concatenate([nibbles, np.full((rows, 1), 8, np.uint8)], axis=1)
    return np.ascontiguousarray(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4))


def decode(packed_BW: NDArray[np.uint8], size: int, codec: Codec) -> NDArray[np.float32]:  # noqa: N803
    """Unpack (B, encoded_width) bytes into (B, size) float32 values.

    Raises:
        ValueError: The width is not that of `size` values in this codec.
    """
    rows, width = packed_BW.shape
    if width != encoded_width(size, codec):
        raise ValueError(f"{width} bytes a row are not {size} values in {codec} ({encoded_width(size, codec)} bytes)")
    packed = np.ascontiguousarray(packed_BW)
    if codec == "float32":
        return packed.view("<f4").reshape(rows, size)
    if codec == "float16":
        return packed.view("<f2").reshape(rows, size).astype(np.float32)
    if codec == "int8":
        scale = np.ascontiguousarray(packed[:, :4]).view("<f4").reshape(rows, 1)
        return packed[:, 4:].view(np.int8).astype(np.float32) * scale
    values = np.empty((rows, 2 * width), np.float32)
    values[:, 0::2] = (packed & 15).astype(np.float32)
    values[:, 1::2] = (packed >> 4).astype(np.float32)
    return np.divide(values[:, :size] - 8, 8, dtype=np.float32)
