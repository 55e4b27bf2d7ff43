"""From a photo to its mask: the one way that evaluation, batch prediction and serving share."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segmentation.data.images import Pixels, mask_image, resize_photo
from segmentation.errors import PipelineError
from segmentation.model import segmenter as model_files
from segmentation.model.decoder import upsample
from segmentation.model.segmenter import ModelCard, Segmenter


@dataclass(frozen=True)
class Augmentation:
    """What a prediction is averaged over. The default is nothing: the photo squeezed to the training size, once.

    Args:
        flip: the mirrored photo as well.
        scales: sizes of the photo as shares of the training size, each rounded to whole patches.
        sliding_window: the photo in its own proportions, its shorter side the training size, and windows of that size
            over it, which overlap by a third at least. Memory grows with the proportions of the photo.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    sliding_window: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Augmentation:
        """That of a registered model's configuration."""
        return cls(config["flip"], tuple(config["scales"]), config["sliding_window"])


@dataclass(frozen=True)
class Predictor:
    """A loaded model, the device it lies on, and what its predictions are averaged over."""

    model: Segmenter
    card: ModelCard
    device: torch.device
    augmentation: Augmentation = Augmentation()

    @classmethod
    def load(cls, folder: Path, augmentation: Augmentation = Augmentation()) -> Predictor:
        """Load `segmenter.safetensors` and `segmenter.json`, onto the GPU where there is one.

        Raises:
            PipelineError: as `segmentation.model.segmenter.load`.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, card = model_files.load(folder)
        return cls(model.to(device), card, device, augmentation)

    @torch.inference_mode()
    def logits(self, photo: Image.Image) -> Tensor:
        """Logits float32 of an upright RGB photo: `[C, S, S]` at training size, or with a sliding window `[C, h, w]`
        in the photo's proportions, the shorter side S.

        One photo, or window, at a time: in a batch, the last bits of its logits depend on its neighbours.

        Raises:
            PipelineError: a logit is NaN or infinite: the best class of such a pixel is none.
        """
        # Logits are averaged, not probabilities: what follows resizes them in any case, which is linear as the mean is,
        # and never has to take the logarithm of a probability that float32 rounded to 0.
        size, views = self._size(photo, 1.0), self.augmentation
        parts = (
            upsample(self._view(photo, scale, mirrored)[None], size)[0]
            for scale in views.scales
            for mirrored in ((False, True) if views.flip else (False,))
        )
        return _finite(reduce(torch.add, parts) / (len(views.scales) * (1 + views.flip)))

    @torch.inference_mode()
    def logits_of(self, tokens: Tensor) -> Tensor:
        """What `logits` gives without augmentation, on a CPU to the bit, from a photo's kept tokens `[K, P + N, D]`.

        Raises:
            PipelineError: as `logits`.
        """
        side = self.card.image_size
        return _finite(self.model.trained(tokens[None].to(self.device), (side, side))[0].float())

    def mask(self, photo: Image.Image) -> Pixels:
        """Class ids `[H, W]` uint8 at the photo's own size."""
        return mask_at(self.logits(photo), photo.height, photo.width)

    def _size(self, photo: Image.Image, scale: float) -> tuple[int, int]:
        """Height and width that a photo is resized to."""
        patch = self.model.encoder.patch
        side = max(1, round(self.card.image_size * scale / patch)) * patch
        if not self.augmentation.sliding_window:
            return side, side
        shorter = min(photo.size)
        return round(side * photo.height / shorter), round(side * photo.width / shorter)

    def _view(self, photo: Image.Image, scale: float, mirrored: bool) -> Tensor:
        """Logits `[C, h, w]` of the photo at one scale, turned back where it was mirrored."""
        resized = np.array(resize_photo(photo, *self._size(photo, scale)))
        pixels = torch.from_numpy(resized).permute(2, 0, 1).to(self.device)
        if mirrored:
            return self._forward(pixels.flip(-1)).flip(-1)
        return self._forward(pixels)

    def _forward(self, pixels: Tensor) -> Tensor:
        """Logits `[C, h, w]` of `[3, h, w]` uint8: at once, or the mean of windows where they overlap."""
        height, width = pixels.shape[1:]
        if not self.augmentation.sliding_window:
            return self.model(pixels[None])[0].float()
        side = min(self.card.image_size, height, width)
        total = torch.zeros(len(self.card.classes), height, width, device=self.device)
        windows = torch.zeros(height, width, device=self.device)
        for top in window_starts(height, side):
            for left in window_starts(width, side):
                here = (..., slice(top, top + side), slice(left, left + side))
                total[here] += self.model(pixels[None][here])[0].float()
                windows[here] += 1
        return total / windows


def _finite(logits: Tensor) -> Tensor:
    if not logits.isfinite().all():
        raise PipelineError(
            "the model's logits of this photo are not finite (NaN or infinite), so it has no mask: numbers overflow; "
            "train again with a lower train.lr, or with train.gradient_clip: 1.0"
        )
    return logits


def mask_png(mask: Pixels) -> bytes:
    """A mask `[H, W]` as the palette PNG that the registered model and the server give."""
    stream = io.BytesIO()
    mask_image(mask).save(stream, "PNG")
    return stream.getvalue()


def class_shares(mask: Pixels) -> dict[int, float]:
    """The classes in a mask `[H, W]`, the largest first, each with its share of the pixels."""
    counts = np.bincount(mask.ravel())
    order = np.argsort(-counts, kind="stable")
    return {int(label): float(counts[label] / mask.size) for label in order if counts[label]}


def window_starts(length: int, window: int) -> list[int]:
    """Where windows begin along a side: as few, evenly spaced, as cover it and overlap by a third at least.

    Args:
        length: of the side, pixels.
        window: of a window, pixels; 2 or more, and no longer than the side.
    """
    steps = -(-(length - window) // (window * 2 // 3))
    return np.linspace(0, length - window, steps + 1).round().astype(int).tolist()


@torch.inference_mode()
def mask_at(logits: Tensor, height: int, width: int) -> Pixels:
    """Logits `[C, h, w]` resized bilinearly to `height` × `width`, then each pixel's best class (the first of equals).

    One class at a time: the memory is that of three planes, not of C.
    """
    best = torch.full((height, width), -torch.inf, device=logits.device)
    mask = torch.zeros((height, width), dtype=torch.uint8, device=logits.device)
    for label, plane in enumerate(logits):
        resized = upsample(plane[None, None], (height, width))[0, 0]
        better = resized > best
        mask[better] = label
        best = torch.where(better, resized, best)
    return mask.cpu().numpy()
