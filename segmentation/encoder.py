"""A timm vision transformer that yields patch tokens, split into a frozen and a trained part."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from segmentation.errors import PipelineError
from segmentation.paths import project_root

if TYPE_CHECKING:  # the registered model runs without what settings need
    from segmentation.settings import EncoderSettings


class Encoder(nn.Module):
    """ViT: images `[B, 3, S, S]`, normalised, to a token grid `[B, D, S/patch, S/patch]`.

    The patch embedding, all blocks but the last `trainable_blocks` and the final norm are frozen: they take no
    gradient and stay in eval mode.

    Args:
        name: a timm model name.
        image_size: S, pixels; a multiple of the patch.
        trainable_blocks: how many of the last blocks are trained.

    Raises:
        PipelineError: unknown name, no plain ViT, a size that the patch does not divide, more blocks than there are.
    """

    def __init__(self, name: str, image_size: int, trainable_blocks: int) -> None:
        super().__init__()
        self.name = name
        self.vit = _create(name, image_size)
        patch = self.vit.patch_embed.patch_size[0]
        if image_size % patch:
            nearest = max(patch, round(image_size / patch) * patch)
            raise PipelineError(
                f"preprocess.image_size: {image_size} is no multiple of the patch, {patch}; use {nearest}"
            )
        depth = len(self.vit.blocks)
        if trainable_blocks > depth:
            raise PipelineError(f"encoder.trainable_blocks: {trainable_blocks}, but {name} has {depth} blocks")
        self.first_trainable = depth - trainable_blocks
        self.dim: int = self.vit.embed_dim
        self.grid: int = image_size // patch
        self.requires_grad_(False)
        self.trainable.requires_grad_(True)

    @property
    def trainable(self) -> nn.Sequential:
        """The trained blocks."""
        return self.vit.blocks[self.first_trainable :]

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Channel mean and standard deviation that the weights expect, for values in [0, 1]."""
        return self.vit.pretrained_cfg["mean"], self.vit.pretrained_cfg["std"]

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        self.vit.eval()
        self.trainable.train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_trainable(self.forward_frozen(images))

    @torch.no_grad()
    def forward_frozen(self, images: Tensor) -> Tensor:
        """Patch embedding and frozen blocks: `[B, 3, S, S]` to tokens `[B, P + N, D]`, P prefix tokens first."""
        vit = self.vit
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for block in vit.blocks[: self.first_trainable]:
            tokens = block(tokens)
        return tokens

    def forward_trainable(self, tokens: Tensor) -> Tensor:
        """Trained blocks and final norm: tokens `[B, P + N, D]` to a grid `[B, D, √N, √N]`."""
        tokens = self.vit.norm(self.trainable(tokens))
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))


def checkpoint_path(settings: EncoderSettings) -> Path | None:
    """`encoder.checkpoint` as a path; a relative one starts at the checkout."""
    return project_root() / Path(settings.checkpoint).expanduser() if settings.checkpoint else None


def check_encoder(settings: EncoderSettings, image_size: int) -> None:
    """Build the encoder and load its weights, so that what is wrong with either shows before hours of other work.

    Raises:
        PipelineError: as `Encoder` and `load_weights`.
    """
    encoder = Encoder(settings.name, image_size, settings.trainable_blocks)
    load_weights(encoder, settings.pretrained, checkpoint_path(settings))


def load_weights(encoder: Encoder, pretrained: bool, checkpoint: Path | None) -> None:
    """Load the weights that are asked for; with neither a checkpoint nor `pretrained` they stay random.

    Args:
        encoder: what is filled.
        pretrained: fetch timm's weights through the hub.
        checkpoint: a file in timm's format or the official DINOv2 release's, `.safetensors` or `.pth`, read without
            executing pickle. It takes precedence.

    Raises:
        PipelineError: the weights cannot be had, or do not fit this encoder.
    """
    if checkpoint is not None:
        _load_checkpoint(encoder.vit, encoder.name, checkpoint)
    elif pretrained:
        _load_pretrained(encoder.vit, encoder.name)


def _create(name: str, image_size: int) -> VisionTransformer:
    try:
        vit = timm.create_model(name, pretrained=False, img_size=image_size, num_classes=0, global_pool="")
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        near = difflib.get_close_matches(
            name, timm.list_models("vit_*") + timm.list_pretrained("vit_*"), n=1, cutoff=0.0
        )
        raise PipelineError(f"encoder.name: timm knows no {name!r}; the nearest is {near[0]}") from None
    except (AssertionError, TypeError) as error:
        raise PipelineError(f"encoder.name: timm cannot build {name!r} at {image_size}: {error}") from None
    if not isinstance(vit, VisionTransformer):
        raise PipelineError(
            f"encoder.name: {name!r} is a {type(vit).__name__}, no plain ViT; try vit_base_patch14_dinov2"
        )
    return vit


def _load_pretrained(vit: VisionTransformer, name: str) -> None:
    try:
        source = timm.create_model(
            name, pretrained=True, img_size=vit.patch_embed.img_size, num_classes=0, global_pool=""
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise PipelineError(
            f"encoder.pretrained: the weights of {name} cannot be had ({str(error).splitlines()[0]}). Either\n"
            "  - connect to the Hugging Face hub (a proxy: HTTPS_PROXY; a mirror: HF_ENDPOINT),\n"
            "  - set encoder.checkpoint to a local weights file, timm's or the official DINOv2 release's, or\n"
            "  - set encoder.pretrained: false to train from random weights"
        ) from None
    vit.load_state_dict(source.state_dict())


def _load_checkpoint(vit: VisionTransformer, name: str, path: Path) -> None:
    if not path.is_file():
        raise PipelineError(f"encoder.checkpoint: {path} not found")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise PipelineError(f"encoder.checkpoint: {path} cannot be read: {error}") from None
    except Exception as error:  # pickle.UnpicklingError and what corrupt pickles raise
        raise PipelineError(
            f"encoder.checkpoint: {path} is no plain weights file, and its pickle is not executed: {error}"
        ) from None
    try:
        state = checkpoint_filter_fn(state, vit)
        state = {key: value for key, value in state.items() if not key.startswith(("head.", "fc_norm."))}
        vit.load_state_dict(state)
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise PipelineError(f"encoder.checkpoint: {path} does not fit {name}: {error}") from None
