"""A timm vision transformer that yields patch tokens, frozen but for its last blocks."""

from __future__ import annotations

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

from segmentation.encoder_names import check_name
from segmentation.errors import PipelineError
from segmentation.hub import weights_file
from segmentation.paths import project_root

if TYPE_CHECKING:  # the registered model runs without what settings need
    from segmentation.settings import EncoderSettings

ViT: TypeAlias = "VisionTransformer | Eva"


class Encoder(nn.Module):
    """ViT: images `[B, 3, H, W]`, normalised, to token grids `[B, D, H/patch, W/patch]`.

    The patch embedding, all blocks but the last `trainable_blocks` and the final norm are frozen: they take no
    gradient and stay in eval mode. `frozen` and `trained` are the two parts; what lies between may be kept. Sides other
    than `image_size` are taken too; position embeddings are resampled.

    Args:
        name: a timm model name.
        image_size: side of the square that position embeddings are made for, pixels; a multiple of the patch.
        trainable_blocks: how many of the last blocks are trained; "all" trains the whole encoder, embeddings included.
        skip_blocks: blocks, numbered from 0, whose tokens are handed out as well.

    Raises:
        PipelineError: unknown name, no plain ViT, a size that the patch does not divide, or blocks that it has not.
    """

    mean: Tensor
    std: Tensor

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
        for name in ("mean", "std"):
            values = torch.tensor(self.vit.pretrained_cfg[name]).view(3, 1, 1) * 255
            self.register_buffer(name, values, persistent=False)

    @property
    def trainable(self) -> nn.Module:
        """What is trained: the last blocks, or everything."""
        return self.vit if self.first_trainable < 0 else self.vit.blocks[self.first_trainable :]

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        self.vit.eval()
        self.trainable.train(mode)
        return self

    @property
    def cached_blocks(self) -> tuple[int, ...]:
        """The frozen blocks whose tokens the trained part takes: the last one, then those of skip connections."""
        return (self.first_trainable - 1, *(block for block in self.skip_blocks if block < self.first_trainable))

    def forward(self, images: Tensor) -> list[Tensor]:
        """The last block's grid, then those of `skip_blocks` in their order, each after the final norm."""
        return self.trained(self.frozen(images), self.grid(images.shape[-2:]))

    def normalise(self, images: Tensor) -> Tensor:
        """Photos `[B, 3, H, W]` uint8 RGB with the channel mean and deviation that the weights expect, float32."""
        return (images - self.mean) / self.std

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width in patches of `size`, height and width in pixels."""
        return size[0] // self.patch, size[1] // self.patch

    def frozen(self, images: Tensor) -> Tensor:
        """What the frozen part makes of images `[B, 3, H, W]`: tokens `[B, K, P + N, D]` of the K `cached_blocks`.

        P prefix tokens come first. Values are rounded to float16 (and kept in the images' type), so that the rest of
        the model sees the same whether they were computed just now or read from `data/features`.
        """
        wanted = self.cached_blocks
        taken = {-1: self._embed(images)}
        tokens, rope = taken[-1], self._rope(self.grid(images.shape[-2:]))
        for index in range(max(0, self.first_trainable)):
            tokens = self._block(index, tokens, rope)
            if index in wanted:
                taken[index] = tokens
        if self.first_trainable < 0:  # nothing is frozen, nothing is rounded
            return tokens[:, None]
        limit = torch.finfo(torch.float16).max
        stacked = torch.stack([taken[index] for index in wanted], dim=1)
        return stacked.clamp(-limit, limit).half().to(stacked.dtype)

    def trained(self, tokens: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The grids of `forward` from the tokens of `frozen`; `grid` is their height and width in patches."""
        vit, rope = self.vit, self._rope(grid)
        current, *skips = tokens.unbind(1)
        taken = dict(zip(self.cached_blocks[1:], skips, strict=True))
        for index in range(max(0, self.first_trainable), len(vit.blocks)):
            current = self._block(index, current, rope)
            taken[index] = current
        chosen = [current, *(taken[index] for index in self.skip_blocks)]
        return [vit.norm(t)[:, vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid) for t in chosen]

    def _block(self, index: int, tokens: Tensor, rope: Tensor | None) -> Tensor:
        block = self.vit.blocks[index]
        if rope is None:
            return block(tokens)
        # DINOv3 and others rotate by position inside each block
        return block(tokens, rope=rope[index] if getattr(self.vit, "rope_mixed", False) else rope)

    def _rope(self, grid: tuple[int, int]) -> Tensor | None:
        """The rotary position embedding, where the model has one."""
        rope = getattr(self.vit, "rope", None)
        return None if rope is None else rope.get_embed(shape=grid)

    def _embed(self, images: Tensor) -> Tensor:
        """Tokens `[B, P + N, D]`, P prefix tokens first."""
        vit = self.vit
        embedded = vit._pos_embed(vit.patch_embed(images))
        return vit.norm_pre(embedded[0] if isinstance(embedded, tuple) else vit.patch_drop(embedded))


def checkpoint_path(settings: EncoderSettings) -> Path | None:
    """`encoder.checkpoint` as a path; a relative one starts at the checkout."""
    return project_root() / Path(settings.checkpoint).expanduser() if settings.checkpoint else None


def check_encoder(settings: EncoderSettings, image_size: int, skip_connections: Sequence[int]) -> None:
    """Refuse what can be known to be wrong without network and weights; nothing is computed or allocated.

    Raises:
        PipelineError: as `Encoder`; the checkpoint is missing, or there are no pretrained weights to load.
    """
    with torch.device("meta"):
        encoder = Encoder(settings.name, image_size, settings.trainable_blocks, skip_connections)
    checkpoint = checkpoint_path(settings)
    if checkpoint is not None:
        _check_is_file(checkpoint)
    elif settings.pretrained and not any(encoder.vit.pretrained_cfg.get(key) for key in ("hf_hub_id", "url", "file")):
        raise PipelineError(
            f"encoder.pretrained: timm has no weights of {settings.name}; choose another encoder.name, set "
            "encoder.checkpoint to a weights file, or set encoder.pretrained: false to train from random weights"
        )


def create_encoder(settings: EncoderSettings, image_size: int, skip_connections: Sequence[int]) -> Encoder:
    """The encoder that the settings describe, with the weights that training starts from.

    Raises:
        PipelineError: as `Encoder` and `load_weights`.
    """
    encoder = Encoder(settings.name, image_size, settings.trainable_blocks, skip_connections)
    load_weights(encoder, settings.pretrained, checkpoint_path(settings))
    return encoder


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
    check_name(name)
    try:
        # dynamic: test-time scales and windows come in other sizes
        vit = timm.create_model(
            name, pretrained=False, img_size=image_size, dynamic_img_size=True, num_classes=0, global_pool=""
        )
    except (RuntimeError, ValueError, OSError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PipelineError(f"encoder.name: timm cannot build {name!r} at {image_size}: {reason}") from None
    assert isinstance(vit, VisionTransformer | Eva)  # check_name knows their modules
    return vit


def _load_pretrained(vit: ViT, name: str) -> None:
    config = vit.pretrained_cfg
    try:
        overlay = {"state_dict": _read(weights_file(config))} if config.get("hf_hub_id") else {}
        source = timm.create_model(
            name, pretrained=True, img_size=vit.patch_embed.img_size, dynamic_img_size=True,
            num_classes=0, global_pool="", pretrained_cfg_overlay=overlay,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise PipelineError(
            f"encoder.pretrained: the weights of {name} cannot be loaded ({str(error).splitlines()[0]}). Either\n"
            "  - connect to the Hugging Face hub (a proxy: HTTPS_PROXY; a mirror: HF_ENDPOINT),\n"
            "  - set encoder.checkpoint to a local weights file, timm's or the official DINOv2 release's, or\n"
            "  - set encoder.pretrained: false to train from random weights"
        ) from None
    vit.load_state_dict(source.state_dict())


def _check_is_file(checkpoint: Path) -> None:
    if not checkpoint.is_file():
        raise PipelineError(f"encoder.checkpoint: {checkpoint} not found")


def _read(path: Path) -> dict[str, Tensor]:
    """A weights file's tensors; pickle is not executed."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_checkpoint(vit: ViT, name: str, path: Path) -> None:
    _check_is_file(path)
    try:
        state = _read(path)
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
