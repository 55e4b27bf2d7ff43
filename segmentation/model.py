"""The segmentation model, and its two files: `segmenter.safetensors` (weights) and `segmenter.json` (the rest)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from segmentation.decoder import Decoder
from segmentation.encoder import Encoder
from segmentation.errors import PipelineError
from segmentation.files import atomic_path, sha256_file, write_json


class ModelCard(BaseModel):
    """`segmenter.json`: everything needed to rebuild the model around its weights, and where they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str
    trainable_blocks: int
    decoder_channels: list[int]
    image_size: int
    classes: list[str]
    encoder_weights: str
    epoch: int
    weights_sha256: str = ""


class Segmenter(nn.Module):
    """Photos `[B, 3, S, S]` uint8 RGB to logits `[B, C, S, S]`; normalisation is inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in encoder.mean_std)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        size = self.encoder.grid * self.encoder.vit.patch_embed.patch_size[0]
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this model takes [B, 3, {size}, {size}] (uint8 RGB): "
                "resize them with segmentation.images.resize_photo"
            )
        tokens = self.encoder((images - self.mean) / self.std)
        return self.decoder(tokens, images.shape[-2:])


def build(card: ModelCard) -> Segmenter:
    """The model that a card describes, with random weights."""
    encoder = Encoder(card.encoder, card.image_size, card.trainable_blocks)
    return Segmenter(encoder, Decoder(encoder.dim, card.decoder_channels, len(card.classes)))


def save(model: Segmenter, card: ModelCard, folder: Path) -> None:
    """Write both files atomically, the card last: where it is, its weights are whole."""
    with atomic_path(folder / "segmenter.safetensors") as temporary:
        temporary.write_bytes(to_bytes({key: value.contiguous() for key, value in model.state_dict().items()}))
    digest = sha256_file(folder / "segmenter.safetensors")
    write_json(folder / "segmenter.json", card.model_copy(update={"weights_sha256": digest}).model_dump())


def load(folder: Path) -> tuple[Segmenter, ModelCard]:
    """Read both files back; the model is in eval mode on the CPU.

    Raises:
        PipelineError: a file is missing, damaged, or the two do not belong together.
    """
    card_file, weights_file = folder / "segmenter.json", folder / "segmenter.safetensors"
    try:
        values: Any = json.loads(card_file.read_text(encoding="utf-8"))
        card = ModelCard.model_validate(values)
        if sha256_file(weights_file) != card.weights_sha256:
            raise PipelineError(f"{weights_file}: not the weights that {card_file.name} describes; run train again")
        model = build(card)
        model.load_state_dict(load_file(weights_file))
    except FileNotFoundError as error:
        raise PipelineError(f"{error.filename}: not found; run train (`dvc repro`) first") from None
    except (json.JSONDecodeError, ValidationError, SafetensorError) as error:
        raise PipelineError(f"{folder}: damaged model files: {error}") from None
    return model.eval(), card
