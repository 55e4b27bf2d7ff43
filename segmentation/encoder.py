"""A timm vision transformer that yields patch tokens, frozen but for its last blocks."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import eva, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segmentation.errors import PipelineError
from segmentation.paths import project_root

if TYPE_CHECKING:  # the registered model runs without what settings need
    from segmentation.settings import EncoderSettings

ViT: TypeAlias = "VisionTransformer | Eva"


class Encoder(nn.Module):
    """ViT: images `[B, 3, H, W]`, normalised, to token grids `[B, D, H/patch, W/patch]`.

    The patch embedding, all blocks but the last `trainable_blocks` and the final norm are frozen: they take no
    gradient and stay in eval mode. Sides other than `image_size` are taken too; position embeddings are resampled.

    Args:
        name: a timm model name.
        image_size: side of the square that position embeddings are made for, pixels; a multiple of the patch.
        trainable_blocks: how many of the last blocks are trained; "all" trains the whole encoder, embeddings included.
        skip_blocks: blocks, numbered from 0, whose tokens are handed out as well.

    Raises:
        PipelineError: unknown name, no plain ViT, a size that the patch does not divide, or blocks that it has not.
    """

    def __init__(
        self, name: str, image_size: int, trainable_blocks: int | Literal["all"], skip_blocks: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.name, self.skip_blocks = name, tuple(skip_blocks)
        self.vit = _create(name, image_size)
        self.patch: int = self.vit.patch_embed.patch_size[0]
        if image_size % self.patch:
            nearest = max(self.patch, round(image_size / self.patch) * self.patch)
            raise PipelineError(
                f"preprocess.image_size: {image_size} is no multiple of the patch, {self.patch}; use {nearest}"
            )
        depth = len(self.vit.blocks)
        if trainable_blocks != "all" and trainable_blocks > depth:
            raise PipelineError(f"encoder.trainable_blocks: {trainable_blocks}, but {name} has {depth} blocks")
        if beyond := [block for block in self.skip_blocks if block >= depth]:
            raise PipelineError(f"decoder.skip_connections: {beyond}, but the blocks of {name} are 0 to {depth - 1}")
        self.dim: int = self.vit.embed_dim
        self.first_trainable = -1 if trainable_blocks == "all" else depth - trainable_blocks
        self.requires_grad_(False)
        self.trainable.requires_grad_(True)

    @property
    def trainable(self) -> nn.Module:
        """What is trained: the last blocks, or everything."""
        return self.vit if self.first_trainable < 0 else self.vit.blocks[self.first_trainable :]

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Channel mean and standard deviation that the weights expect, for values in [0, 1]."""
        return self.vit.pretrained_cfg["mean"], self.vit.pretrained_cfg["std"]

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        self.vit.eval()
        self.trainable.train(mode)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """The last block's grid, then those of `skip_blocks` in their order, each after the final norm."""
        vit, taken = self.vit, {}
        grid = [side // self.patch for side in images.shape[-2:]]
        tokens, rope = self._embed(images)
        for index, block in enumerate(vit.blocks):
            if rope is None:
                tokens = block(tokens)
            else:  # DINOv3 and others rotate by position inside each block
                tokens = block(tokens, rope=rope[index] if getattr(vit, "rope_mixed", False) else rope)
            if index in self.skip_blocks:
                taken[index] = tokens
        chosen = [tokens, *(taken[index] for index in self.skip_blocks)]
        return [vit.norm(t)[:, vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid) for t in chosen]

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens `[B, P + N, D]`, P prefix tokens first, and the rotary embedding where the model has one."""
        vit = self.vit
        embedded = vit._pos_embed(vit.patch_embed(images))
        tokens, rope = embedded if isinstance(embedded, tuple) else (vit.patch_drop(embedded), None)
        return vit.norm_pre(tokens), rope


def checkpoint_path(settings: EncoderSettings) -> Path | None:
    """`encoder.checkpoint` as a path; a relative one starts at the checkout."""
    return project_root() / Path(settings.checkpoint).expanduser() if settings.checkpoint else None


def check_encoder(settings: EncoderSettings, image_size: int, skip_connections: Sequence[int]) -> None:
    """Build the encoder and load its weights, so that what is wrong with either shows before hours of other work.

    Raises:
        PipelineError: as `Encoder` and `load_weights`.
    """
    encoder = Encoder(settings.name, image_size, settings.trainable_blocks, skip_connections)
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


def _create(name: str, image_size: int) -> ViT:
    try:
        # dynamic: test-time scales and windows come in other sizes
        vit = timm.create_model(
            name, pretrained=False, img_size=image_size, dynamic_img_size=True, num_classes=0, global_pool=""
        )
    except (RuntimeError, ValueError, OSError, AssertionError, TypeError) as error:
        if "Unknown model" not in str(error):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PipelineError(f"encoder.name: timm cannot build {name!r} at {image_size}: {reason}") from None
        near = difflib.get_close_matches(
            name, timm.list_models("vit_*") + timm.list_pretrained("vit_*"), n=1, cutoff=0.0
        )
        raise PipelineError(f"encoder.name: timm knows no {name!r}; the nearest is {near[0]}") from None
    if not isinstance(vit, VisionTransformer | Eva):
        raise PipelineError(
            f"encoder.name: {name!r} is a {type(vit).__name__}, no plain ViT; try vit_base_patch14_dinov2"
        )
    return vit


def _load_pretrained(vit: ViT, name: str) -> None:
    try:
        source = timm.create_model(
            name, pretrained=True, img_size=vit.patch_embed.img_size, dynamic_img_size=True,
            num_classes=0, global_pool="",
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        raise PipelineError(
            f"encoder.pretrained: the weights of {name} cannot be had ({str(error).splitlines()[0]}). Either\n"
            "  - connect to the Hugging Face hub (a proxy: HTTPS_PROXY; a mirror: HF_ENDPOINT),\n"
            "  - set encoder.checkpoint to a local weights file, timm's or the official DINOv2 release's, or\n"
            "  - set encoder.pretrained: false to train from random weights"
        ) from None
    vit.load_state_dict(source.state_dict())


def _load_checkpoint(vit: ViT, name: str, path: Path) -> None:
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
        state = (eva if isinstance(vit, Eva) else vision_transformer).checkpoint_filter_fn(state, vit)
        state = {key: value for key, value in state.items() if not key.startswith(("head.", "fc_norm."))}
        vit.load_state_dict(state)
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise PipelineError(f"encoder.checkpoint: {path} does not fit {name}: {error}") from None
