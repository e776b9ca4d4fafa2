"""Embedding codecs in torch (schemas.codecs): the bytes travel, and are decoded on the device where they lie."""

import torch
from torch import Tensor

from schemas.codecs import Codec, encoded_width


def decode(packed_BW: Tensor, size: int, codec: Codec) -> Tensor:
    """Give (B, size) float32 for (B, W) uint8, on their device; the same values as schemas.codecs.decode.

    Raises:
        ValueError: W is not the width of `size` values in this codec.
    """
    width = packed_BW.shape[1]
    if width != encoded_width(size, codec):
        raise ValueError(f"{width} bytes a row are not {size} values in {codec} ({encoded_width(size, codec)} bytes)")
    if not len(packed_BW):
        return packed_BW.new_zeros((0, size), dtype=torch.float32)
    if codec == "float32":
        return packed_BW.contiguous().view(torch.float32)
    if codec == "float16":
        return packed_BW.contiguous().view(torch.float16).float()
    if codec == "int8":
        scale_B1 = packed_BW[:, :4].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return packed_BW[:, 4:].view(torch.int8).float() * scale_B1
    nibbles_BD = torch.stack([packed_BW & 15, packed_BW >> 4], dim=2).flatten(1)[:, :size]
    return (nibbles_BD.float() - 8) / 8
