"""One training step at ViT-B/14, 518×518, batch 2, against the plain recipe: timm, segmentation-models-pytorch, a loop.

The plain step: the whole encoder's forward (its frozen blocks take no gradient), upsampling before each convolution,
smp's Lovász loss, AdamW. Ours goes on from kept tokens, as training does after `encode`, in the precision that training
chooses on this machine, and in float32. Peak memory is that of a fresh process with two steps.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import timm
import torch
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor, nn

from benchmarks.side_by_side import compare, in_a_fresh_process, line, parser, real_masks, run, settings_for, take_turns
from segmentation.data.voc import CLASSES, VOID
from segmentation.model import segmenter as model_files
from segmentation.model.segmenter import Segmenter
from segmentation.training.loop import model_card
from segmentation.training.losses import lovasz_softmax
from segmentation.training.optimizer import optimiser, precision


class PlainSegmenter(nn.Module):
    """The report's model as one would write it: `[B, 3, S, S]`, normalised, to logits `[B, 21, S, S]`."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        self.encoder = timm.create_model(name, pretrained=False, img_size=size, num_classes=0)
        self.grid = size // 14
        self.encoder.requires_grad_(False)
        self.encoder.blocks[-1].requires_grad_(True)
        sizes = [self.grid * 2, self.grid * 4, self.grid * 8, size]
        widths = [self.encoder.embed_dim, 512, 256, 128, 64]
        layers: list[nn.Module] = []
        for narrow, wide, side in zip(widths[1:], widths, sizes, strict=False):
            layers += [
                nn.Upsample(size=(side, side), mode="bilinear"), nn.Conv2d(wide, narrow, 3, padding=1),
                nn.BatchNorm2d(narrow), nn.ReLU(),
            ]  # fmt: skip
        self.decoder = nn.Sequential(*layers, nn.Conv2d(widths[-1], len(CLASSES), 1))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        return self.decoder(tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid)))


class PlainStep:
    """A step of the plain recipe on photos."""

    def __init__(self, name: str, size: int) -> None:
        torch.manual_seed(0)
        self.model = PlainSegmenter(name, size).train()
        self.loss = LovaszLoss("multiclass", ignore_index=VOID)
        self.adamw = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self, images: Tensor, masks: Tensor) -> None:
        mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
        loss = self.loss(self.model((images / 255 - mean) / deviation), masks.long())
        self.adamw.zero_grad()
        loss.backward()
        self.adamw.step()


class OurStep:
    """A step of ours on kept tokens: what `TrainingTask` and Lightning do, without Lightning."""

    def __init__(self, model: Segmenter, chosen_precision: str) -> None:
        self.model = model.train()
        self.adamw = optimiser(model, 1e-4, 0.01, 1.0, 1.0)
        self.half = chosen_precision == "bf16-mixed"

    def __call__(self, tokens: Tensor, masks: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            loss = lovasz_softmax(self.model.trained(tokens, masks.shape[-2:]), masks)
        self.adamw.zero_grad()
        loss.backward()
        self.adamw.step()


def main() -> None:
    made = parser("training_step", __doc__)
    made.add_argument("--rounds", type=int, default=3, help="turns of each side (default: %(default)s)")
    made.add_argument("--encoder", default="vit_base_patch14_dinov2", help="a timm name (default: %(default)s)")
    made.add_argument("--size", type=int, default=518, help="side of the photos (default: %(default)s)")
    made.add_argument("--batch", type=int, default=2, help="photos a step (default: %(default)s)")
    run(made, measure)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    name, size, batch = arguments.encoder, arguments.size, arguments.batch
    masks = real_masks(arguments.voc, batch, size)
    images = torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    plain, model = PlainStep(name, size), our_model(arguments)
    with torch.no_grad():
        tokens = model.frozen(images).half()
    checks = check(plain, model, images, tokens, masks)
    sides = {"plain": partial(plain, images, masks)}
    kinds = dict.fromkeys((precision(), "32-true"))
    for kind in kinds:
        sides[kind] = partial(OurStep(model, kind), tokens, masks)
    take_turns(sides, 1)  # the first step allocates
    seconds = take_turns(sides, arguments.rounds)
    steps = {kind: compare(seconds["plain"], seconds[kind]) for kind in kinds}
    memory = {
        side: in_a_fresh_process(two_steps, side, name, size, batch, masks, settings(arguments)).peak_gb
        for side in ("plain", "ours")
    }
    print(f"{f'{name}, {size}×{size}, batch {batch}':44}{'plain':>12}{'ours':>12}{'ratio':>9}")
    for label, step in steps.items():
        line(f"training step, {label}", step)
    print(f"{'peak memory':44}{memory['plain']:9.2f} GB{memory['ours']:9.2f} GB")
    for text, value in checks.items():
        print(f"{text}: {value:.1e}")
    return {**steps[precision()], "steps": steps, "peak_memory_gb": memory, "checked": checks}


def settings(arguments: argparse.Namespace) -> Any:
    return settings_for(arguments.voc, encoder__name=arguments.encoder, preprocess__image_size=arguments.size)


def our_model(arguments: argparse.Namespace) -> Segmenter:
    torch.manual_seed(0)
    return model_files.build(model_card(settings(arguments), list(CLASSES)))


@torch.no_grad()
def check(plain: PlainStep, model: Segmenter, images: Tensor, tokens: Tensor, masks: Tensor) -> dict[str, float]:
    """Both sides compute the same: encoders of the same weights, kept tokens, and losses."""
    model.encoder.vit.load_state_dict(plain.model.encoder.state_dict())
    normal = model.encoder.normalise(images)
    reference = plain.model.encoder.forward_features(normal)[:, plain.model.encoder.num_prefix_tokens :]
    (grid,) = model.encoder(normal)
    logits = model.trained(model.frozen(images), masks.shape[-2:])
    kept = model.trained(model.frozen(images).half(), masks.shape[-2:])
    smp = plain.loss(logits, masks.long())
    return {
        "encoder, ours (frozen tokens in float16) against timm's, largest difference": (
            (grid.flatten(2).transpose(1, 2) - reference).abs().max() / reference.abs().max()
        ).item(),
        "logits from kept tokens against computed ones, largest difference": (kept - logits).abs().max().item(),
        "loss against smp's on the same logits, relative": abs(lovasz_softmax(logits, masks) / smp - 1).item(),
    }


def two_steps(side: str, name: str, size: int, batch: int, masks: Tensor, chosen: Any) -> None:
    """For peak memory, in a process of its own."""
    images = torch.zeros(batch, 3, size, size, dtype=torch.uint8)
    if side == "plain":
        step: Any = PlainStep(name, size)
        inputs = images
    else:
        model = model_files.build(model_card(chosen, list(CLASSES)))
        step, grid = OurStep(model, precision()), size // model.encoder.patch
        inputs = torch.zeros(batch, 1, model.encoder.vit.num_prefix_tokens + grid**2, model.encoder.dim).half()
    for _ in range(2):
        step(inputs, masks)


if __name__ == "__main__":
    main()
