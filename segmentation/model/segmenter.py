"""The segmentation model, and its two files: `segmenter.safetensors` (weights) and `segmenter.json` (the rest)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from segmentation.errors import PipelineError
from segmentation.files import atomic_path, sha256_file, write_json
from segmentation.model.decoder import LinearDecoder, UNetDecoder
from segmentation.model.encoder import Encoder


class ModelCard(BaseModel):
    """`segmenter.json`: everything needed to rebuild the model around its weights, and where they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str
    trainable_blocks: int | Literal["all"]
    decoder: str
    decoder_channels: list[int]
    decoder_norm: str
    skip_connections: list[int]
    image_size: int
    classes: list[str]
    encoder_weights: str
    epoch: int
    weights_sha256: str = ""


class Segmenter(nn.Module):
    """Photos `[B, 3, H, W]` uint8 RGB, sides multiples of the patch, to logits `[B, C, H, W]`; normalises inside."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: Tensor) -> Tensor:
        return self.trained(self.frozen(images), images.shape[-2:])

    def frozen(self, images: Tensor) -> Tensor:
        """Photos to the tokens of `Encoder.frozen`, which `trained` goes on from."""
        patch = self.encoder.patch
        if images.ndim != 4 or images.shape[1] != 3 or any(side % patch for side in images.shape[2:]):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this model takes [B, 3, H, W] (uint8 RGB), H and W "
                f"multiples of {patch}: resize them with segmentation.data.images.resize_photo"
            )
        return self.encoder.frozen(self.encoder.normalise(images))

    def trained(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """Tokens `[B, K, P + N, D]` of photos of `size` (height, width), just computed or kept, to logits."""
        return self.decoder(self.encoder.trained(tokens.float(), self.encoder.grid(size)), size)


def build(card: ModelCard) -> Segmenter:
    """The model that a card describes, with random weights."""
    encoder = Encoder(card.encoder, card.image_size, card.trainable_blocks, card.skip_connections)
    if card.decoder == "linear":
        return Segmenter(encoder, LinearDecoder(encoder.dim, len(card.classes)))
    decoder = UNetDecoder(
        encoder.dim, len(card.classes), card.decoder_channels, card.decoder_norm, len(card.skip_connections)
    )
    return Segmenter(encoder, decoder)


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold NaN or infinity; the device is waited for once."""
    if not weights:
        return []
    finite = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()
    return [name for name, fine in zip(weights, finite, strict=True) if not fine]


def name_some(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def save(model: Segmenter, card: ModelCard, folder: Path) -> None:
    """Write both files atomically, the card last: where it is, its weights are whole.

    Raises:
        PipelineError: a weight is NaN or infinite.
    """
    _require_finite(model, folder / "segmenter.safetensors", "it is not written")
    with atomic_path(folder / "segmenter.safetensors") as temporary:
        temporary.write_bytes(to_bytes({key: value.contiguous() for key, value in model.state_dict().items()}))
    digest = sha256_file(folder / "segmenter.safetensors")
    write_json(folder / "segmenter.json", card.model_copy(update={"weights_sha256": digest}).model_dump())


def load(folder: Path) -> tuple[Segmenter, ModelCard]:
    """Read both files back; the model is in eval mode on the CPU.

    Raises:
        PipelineError: a file is missing, damaged, or the two do not belong together; a weight is NaN or infinite. What
            to do about it, the caller knows: it depends on where the files come from.
    """
    card_file, weights_file = folder / "segmenter.json", folder / "segmenter.safetensors"
    try:
        values: Any = json.loads(card_file.read_text(encoding="utf-8"))
        card = ModelCard.model_validate(values)
        if sha256_file(weights_file) != card.weights_sha256:
            raise PipelineError(f"{weights_file}: not the weights that {card_file.name} describes")
        model = build(card)
        model.load_state_dict(load_file(weights_file))
    except FileNotFoundError as error:
        raise PipelineError(f"{error.filename}: not found") from None
    except (json.JSONDecodeError, ValidationError, SafetensorError) as error:
        raise PipelineError(f"{folder}: damaged model files: {error}") from None
    except RuntimeError:  # torch's, with all keys that it found and missed
        raise PipelineError(f"{weights_file}: not of the model that {card_file.name} describes") from None
    _require_finite(model, weights_file, "its masks would be wrong")
    return model.eval(), card


def _require_finite(model: Segmenter, file: Path, therefore: str) -> None:
    if found := not_finite(model.state_dict()):
        raise PipelineError(
            f"{file}: {name_some(found)}: weights that are not finite (NaN or infinite), so {therefore}; train again "
            "with a lower train.lr, or with train.gradient_clip: 1.0"
        )
