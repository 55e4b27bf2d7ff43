"""The model as a table: what each part puts out, and how much of it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from segmentation.model.segmenter import ModelCard, Segmenter, build


def summarise(card: ModelCard) -> str:
    """A line a layer: output `[C, H, W]`, or `[N, D]` for tokens, parameters, trained parameters.

    Nothing is computed and no weight is allocated (torch's meta device).
    """
    with torch.device("meta"):
        model = build(card)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in _layers(model).items():
            module.register_forward_hook(_recorder(name, shapes))
        model(torch.empty(1, 3, card.image_size, card.image_size))
    rows = [("layer", "output", "parameters", "trained")]
    for name, module in _layers(model).items():
        every = list(module.parameters())
        trained = sum(p.numel() for p in every if p.requires_grad)
        shape = "×".join(map(str, shapes[name]))
        rows.append((name, shape, f"{sum(p.numel() for p in every):,}", f"{trained:,}"))
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    size = card.image_size
    rows.append(("logits", f"{len(card.classes)}×{size}×{size}", f"{total[0]:,}", f"{total[1]:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([f"{row[0]:<{widths[0]}}", *(f"{row[i]:>{widths[i]}}" for i in (1, 2, 3))]) for row in rows]
    note = []
    if card.decoder == "unet":
        side = shapes["decoder.head"][-1]
        note = ["", f"The head comes before the last upsampling, {side} → {size}: the same logits for less work."]
    title = f"{card.encoder} with a {card.decoder} decoder at {size}×{size}, {len(card.classes)} classes"
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:-1], "-" * len(lines[0]), lines[-1], *note])


def _layers(model: Segmenter) -> dict[str, nn.Module]:
    vit, decoder = model.encoder.vit, model.decoder
    layers = {"encoder.patch_embed": vit.patch_embed}
    layers |= {f"encoder.blocks.{index}": block for index, block in enumerate(vit.blocks)}
    layers |= {"encoder.norm": vit.norm}
    for index, block in enumerate(getattr(decoder, "blocks", [])):
        layers[f"decoder.blocks.{index}.conv"] = block.conv
        layers[f"decoder.blocks.{index}"] = block
    return layers | {"decoder.head": decoder.head}


def _recorder(name: str, shapes: dict[str, tuple[int, ...]]) -> Any:
    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        shapes[name] = tuple(output.shape[1:])

    return record
