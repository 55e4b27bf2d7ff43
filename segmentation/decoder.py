"""The U-Net-style decoder: four conv blocks from the token grid up to the image's size, then a 1×1 head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


class DecoderBlock(nn.Module):
    """3×3 convolution, batch norm, ReLU, then bilinear upsampling: `[B, C_in, h, w]` to `[B, C_out, *size]`.

    The convolution comes before the upsampling: a quarter of the arithmetic of the other order.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        return upsample(F.relu(self.norm(self.conv(features)), inplace=True), size)


class Decoder(nn.Module):
    """Token grid `[B, D, g, g]` to logits `[B, C, S, S]`; sizes double per block (37→74→148→296), the last is S.

    The 1×1 head is computed before the last upsampling. Both are linear and the upsampling's weights sum to one, so the
    order makes no difference to the logits, and C channels are upsampled instead of the last block's.

    Args:
        dim: D, the encoder's width.
        channels: output channels of the four blocks.
        classes: C.
    """

    def __init__(self, dim: int, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        widths = [dim, *channels]
        self.blocks = nn.ModuleList(DecoderBlock(a, b) for a, b in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        features = tokens
        for index, block in enumerate(self.blocks, start=1):
            height, width = (side * 2**index for side in tokens.shape[-2:])
            last = index == len(self.blocks)
            features = block(features, features.shape[-2:] if last else (height, width))
        return upsample(self.head(features), size)


def upsample(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, `align_corners=False`; `[B, C, h, w]` to `[B, C, *size]`."""
    if features.shape[-2:] == size:
        return features
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)
