"""Decoders from token grids to logits: the U-Net-style one of four conv blocks, and the linear baseline."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import gcd

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F


class DecoderBlock(nn.Module):
    """3×3 convolution, norm, ReLU, then bilinear upsampling: `[B, C_in, h, w]` to `[B, C_out, *size]`.

    The convolution comes before the upsampling: a quarter of the arithmetic of the other order. With a skip connection
    the tokens `[B, D, g, g]` of an earlier encoder block are projected to `C_in / 2` channels, upsampled to `h` × `w`
    and concatenated to the input.

    Args:
        channels_in: C_in.
        channels_out: C_out.
        norm: `batch`, `group` (up to 32 groups) or `layer` (over the channels of each pixel).
        skip_dim: D, or None for a block without a skip connection.
    """

    def __init__(self, channels_in: int, channels_out: int, norm: str, skip_dim: int | None = None) -> None:
        super().__init__()
        skipped = 0 if skip_dim is None else max(1, channels_in // 2)
        self.skip = None if skip_dim is None else nn.Conv2d(skip_dim, skipped, 1)
        self.conv = nn.Conv2d(channels_in + skipped, channels_out, 3, padding=1, bias=False)
        self.norm = _norm(norm, channels_out)

    def forward(self, features: Tensor, size: tuple[int, int], skip: Tensor | None = None) -> Tensor:
        if self.skip is not None:
            features = torch.cat([features, upsample(self.skip(skip), features.shape[-2:])], dim=1)
        return upsample(F.relu(self.norm(self.conv(features)), inplace=True), size)


class UNetDecoder(nn.Module):
    """Token grids `[B, D, g, g]` to logits `[B, C, S, S]`; sizes double per block (37→74→148→296), the last is S.

    The 1×1 head is computed before the last upsampling. Both are linear and the upsampling's weights sum to one, so the
    order makes no difference to the logits, and C channels are upsampled instead of the last block's.

    Args:
        dim: D, the encoder's width.
        classes: C.
        channels: output channels of the four blocks.
        norm: see `DecoderBlock`.
        skips: how many skip connections there are; they enter the second block and those after it.
    """

    def __init__(self, dim: int, classes: int, channels: Sequence[int], norm: str = "batch", skips: int = 0) -> None:
        super().__init__()
        widths = [dim, *channels]
        self.blocks = nn.ModuleList(
            DecoderBlock(a, b, norm, dim if 0 < index <= skips else None)
            for index, (a, b) in enumerate(pairwise(widths))
        )
        self.head = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, grids: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits `[B, C, *size]` from the encoder's last grid and those of the skip connections, in this order."""
        features, *skips = grids
        for index, block in enumerate(self.blocks):
            height, width = (side * 2 ** (index + 1) for side in grids[0].shape[-2:])
            last = index == len(self.blocks) - 1
            skip = skips[index - 1] if 0 < index <= len(skips) else None
            features = block(features, features.shape[-2:] if last else (height, width), skip)
        return upsample(self.head(features), size)


class LinearDecoder(nn.Module):
    """The DINOv2 paper's baseline: one 1×1 layer on the tokens `[B, D, g, g]`, upsampled to logits `[B, C, S, S]`."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(dim, classes, 1)

    def forward(self, grids: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        return upsample(self.head(grids[0]), size)


def upsample(features: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, `align_corners=False`; `[B, C, h, w]` to `[B, C, *size]`."""
    if features.shape[-2:] == tuple(size):
        return features
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


def _norm(norm: str, channels: int) -> nn.Module:
    if norm == "group":
        return nn.GroupNorm(gcd(32, channels), channels)
    return LayerNorm2d(channels) if norm == "layer" else nn.BatchNorm2d(channels)
