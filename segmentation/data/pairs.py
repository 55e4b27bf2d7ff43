"""Processed pairs as tensors, and their augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from segmentation.data.voc import VOID


def split_ids(manifest: Path, split: str) -> list[str]:
    """The ids of a split, in list order."""
    table = pd.read_parquet(manifest, columns=["id", "split"])
    return table.loc[table["split"] == split, "id"].tolist()


def class_pixels(manifest: Path, split: str) -> Tensor:
    """Labelled pixels of each class in each photo of a split, `[N, C]` int64."""
    table = pd.read_parquet(manifest, columns=["split", "pixels"])
    return torch.from_numpy(np.stack(table.loc[table["split"] == split, "pixels"].to_list()))


class PairDataset(Dataset[tuple[Tensor, Tensor, str]]):
    """Pairs of `data/processed`: image `[3, S, S]` uint8 RGB, mask `[S, S]` uint8 class ids (255 void), id.

    Args:
        processed: the folder.
        ids: which pairs.
        augmentation: changes image and mask together, see `augmentation`; a pair is then asked for by what
            `EpochSampler` yields, and what happens to it depends on that alone, in whatever process.
    """

    def __init__(self, processed: Path, ids: list[str], augmentation: v2.Transform | None = None) -> None:
        self.processed, self.ids, self.augmentation = processed, ids, augmentation

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        position, seed = index if isinstance(index, tuple) else (index, 0)
        identifier = self.ids[position]
        image = self._image(identifier)
        labels = np.array(Image.open(self.processed / "masks" / f"{identifier}.png"))
        mask = torch.from_numpy(labels)
        if self.augmentation is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                image, mask = self.augmentation(tv_tensors.Image(image), tv_tensors.Mask(mask))
            image, mask = image.as_subclass(Tensor), mask.as_subclass(Tensor)
        return image, mask, identifier

    def _image(self, identifier: str) -> Tensor:
        pixels = np.array(Image.open(self.processed / "images" / f"{identifier}.png"))
        return torch.from_numpy(pixels).permute(2, 0, 1)


class FeaturePairs(PairDataset):
    """As `PairDataset`, but with the kept tokens `[K, P + N, D]` float16 of the photo in the place of its pixels.

    Args:
        processed: the folder of the masks.
        ids: those of `split`, in list order.
        augmentation: nothing but mirroring.
        tokens: gives those of a position, mirrored or not.
    """

    def __init__(
        self, processed: Path, ids: list[str], augmentation: v2.Transform | None, tokens: Callable[[int, bool], Tensor]
    ) -> None:
        super().__init__(processed, ids, augmentation)
        self.tokens = tokens

    def _image(self, identifier: str) -> Tensor:
        # Two pixels go through the augmentation with the mask; where they end tells whether it mirrored.
        return torch.tensor([[[0, 1]]], dtype=torch.uint8).expand(3, 1, 2)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        image, mask, identifier = super().__getitem__(index)
        position = index[0] if isinstance(index, tuple) else index
        return self.tokens(position, bool(image[0, 0, 0])), mask, identifier


class EpochSampler(DistributedSampler[Any]):
    """Positions in an order that depends on seed and epoch alone, each with the seed of its augmentation.

    Lightning tells it the epoch; so a resumed run goes on exactly as an uninterrupted one.
    """

    def __init__(self, dataset: PairDataset, seed: int) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, seed=seed)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        seeds = torch.randint(2**62, (len(self.dataset),), generator=generator).tolist()  # type: ignore[arg-type]
        return ((position, seeds[position]) for position in super().__iter__())


def augmentation(
    image_size: int, horizontal_flip: float, scale: Sequence[float] | None, colour_jitter: float
) -> v2.Transform | None:
    """Random changes of an image and its mask together, or None where nothing would change.

    Args:
        image_size: S; both keep it.
        horizontal_flip: probability of mirroring.
        scale: smallest and largest random size, as shares of S; then S × S is cropped at random, and what is missing is
            padded: the image with black, the mask with void.
        colour_jitter: strength of random brightness, contrast and saturation; hue moves a quarter of it.
    """
    steps: list[v2.Transform] = []
    if scale is not None:
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: VOID}
        steps += [
            v2.ScaleJitter((image_size, image_size), tuple(scale), antialias=True),
            v2.RandomCrop(image_size, pad_if_needed=True, fill=fill),
        ]
    if horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(horizontal_flip))
    if colour_jitter:
        steps.append(v2.ColorJitter(colour_jitter, colour_jitter, colour_jitter, colour_jitter / 4))
    return v2.Compose(steps) if steps else None
