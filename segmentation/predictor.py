"""From a photo to its mask: the one way that evaluation, batch prediction and serving share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segmentation import model as model_files
from segmentation.decoder import upsample
from segmentation.images import Pixels, resize_photo
from segmentation.model import ModelCard, Segmenter


@dataclass(frozen=True)
class Predictor:
    """A loaded model and the device it lies on."""

    model: Segmenter
    card: ModelCard
    device: torch.device

    @classmethod
    def load(cls, folder: Path) -> Predictor:
        """Load `segmenter.safetensors` and `segmenter.json`, onto the GPU where there is one.

        Raises:
            PipelineError: as `segmentation.model.load`.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, card = model_files.load(folder)
        return cls(model.to(device), card, device)

    @torch.inference_mode()
    def logits(self, photo: Image.Image) -> Tensor:
        """Logits `[C, S, S]` float32 of an upright RGB photo, at training size.

        One photo at a time: in a batch, the last bits of a photo's logits depend on its neighbours.
        """
        pixels = np.array(resize_photo(photo, self.card.image_size))
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.device)
        return self.model(images)[0].float()

    def mask(self, photo: Image.Image) -> Pixels:
        """Class ids `[H, W]` uint8 at the photo's own size."""
        return mask_at(self.logits(photo), photo.height, photo.width)


@torch.inference_mode()
def mask_at(logits: Tensor, height: int, width: int) -> Pixels:
    """Logits `[C, S, S]` resized bilinearly to `height` × `width`, then each pixel's best class (the first of equals).

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
