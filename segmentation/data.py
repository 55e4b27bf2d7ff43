"""Processed pairs as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


def split_ids(manifest: Path, split: str) -> list[str]:
    """The ids of a split, in list order."""
    table = pd.read_parquet(manifest, columns=["id", "split"])
    return table.loc[table["split"] == split, "id"].tolist()


class PairDataset(Dataset[tuple[Tensor, Tensor, str]]):
    """Pairs of `data/processed`: image `[3, S, S]` uint8 RGB, mask `[S, S]` uint8 class ids (255 void), id."""

    def __init__(self, processed: Path, ids: list[str]) -> None:
        self.processed, self.ids = processed, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        identifier = self.ids[index]
        image = np.array(Image.open(self.processed / "images" / f"{identifier}.png"))
        mask = np.array(Image.open(self.processed / "masks" / f"{identifier}.png"))
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask), identifier
