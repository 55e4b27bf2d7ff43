"""A timm vision transformer that yields patch tokens, frozen but for its last blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import timm
import torch
from timm.models import eva, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segmentation.errors import PipelineError
from segmentation.model.checkpoint_files import (
    Measures,
    NotWeightsError,
    check_weights_file,
    find_vit,
    measure,
    read_weights,
)
from segmentation.model.encoder_names import buildable, check_name
from segmentation.model.hub import weights_file
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
        try:
            check_weights_file(checkpoint)
        except (NotWeightsError, OSError) as error:
            raise _no_checkpoint(settings.name, checkpoint, error) from None
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
        checkpoint: a file in the names of timm, of the official DINOv2 release or of Hugging Face's `Dinov2Model`,
            bare or as a training wraps it, safetensors or saved by torch, read without executing pickle. It takes
            precedence.

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
        overlay = {"state_dict": read_weights(weights_file(config))} if config.get("hf_hub_id") else {}
        source = timm.create_model(
            name, pretrained=True, img_size=vit.patch_embed.img_size, dynamic_img_size=True,
            num_classes=0, global_pool="", pretrained_cfg_overlay=overlay,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        raise PipelineError(
            f"encoder.pretrained: the weights of {name} cannot be loaded ({str(error).splitlines()[0]}). Either\n"
            "  - connect to the Hugging Face hub (a proxy: HTTPS_PROXY; a mirror: HF_ENDPOINT),\n"
            "  - set encoder.checkpoint to a local weights file, timm's, DINOv2's release's or Hugging Face's, or\n"
            "  - set encoder.pretrained: false to train from random weights"
        ) from None
    vit.load_state_dict(source.state_dict())


def _load_checkpoint(vit: ViT, name: str, path: Path) -> None:
    try:
        state = find_vit(read_weights(path))
    except (NotWeightsError, OSError) as error:
        raise _no_checkpoint(name, path, error) from None
    found, wanted = measure(state), _measures(vit)
    unlike = str(found) if found else f"{len(state)} entries, {', '.join(sorted(map(str, state))[:3])}, …"
    # timm knows some families that name their tensors otherwise; and would resample another patch without a word
    if found in (None, wanted):
        try:
            fitted = (eva if isinstance(vit, Eva) else vision_transformer).checkpoint_filter_fn(state, vit)
            fitted = {key: value for key, value in fitted.items() if not key.startswith(("head.", "fc_norm."))}
            differences = _differences(fitted, vit)
            if not differences:
                vit.load_state_dict(fitted)
                return
            unlike += f", {differences}" * (found is not None)
        except (RuntimeError, KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
            unlike += f" ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    raise PipelineError(
        f"encoder.checkpoint: {path} does not fit {name}: it holds {unlike}\n"
        f"  expected: {wanted}, as {name} has them{_other_name(name, found)}"
    )


def _no_checkpoint(name: str, path: Path, error: Exception) -> PipelineError:
    found = error.strerror if isinstance(error, OSError) else f"{error}"
    return PipelineError(
        f"encoder.checkpoint: {path}: {found}\n"
        f"  expected: the tensors of {name} alone, .safetensors or .pth, in the names of timm, of the official DINOv2 "
        "release or of Hugging Face's Dinov2Model"
    )


def _measures(vit: ViT) -> Measures:
    registers = vit.num_prefix_tokens - (vit.cls_token is not None)
    return Measures(vit.embed_dim, len(vit.blocks), vit.patch_embed.patch_size[0], registers)


def _differences(state: Mapping[str, Any], vit: ViT) -> str:
    """How tensors differ from the model's, in words; empty where they fit."""
    wanted = vit.state_dict()
    lacking = [key for key in wanted if key not in state]
    besides = [key for key in state if key not in wanted]
    shaped = [key for key in wanted if key in state and wanted[key].shape != getattr(state[key], "shape", None)]
    whole = [key for key in wanted if isinstance(state.get(key), Tensor) and not state[key].is_floating_point()]
    cases = (("without", lacking), ("with", besides), ("of another shape in", shaped), ("whole numbers in", whole))
    return ", ".join(
        f"{word} {keys[0]}" + f" and {len(keys) - 1} more" * (len(keys) > 1) for word, keys in cases if keys
    )


def _other_name(name: str, found: Measures | None) -> str:
    """The encoder of the same family that tensors of these measures fit, as advice."""
    sizes = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1536: "giant"}
    if found is None or found.width not in sizes:
        return ""
    registers = f"_reg{found.registers}" * bool(found.registers)
    start = f"vit_{sizes[found.width]}_patch{found.patch}{registers}"
    other = re.sub(r"^vit_[a-z0-9]+_patch\d+(_reg\d)?", start, name.partition(".")[0])
    if other == name or other not in buildable():
        return ""
    with torch.device("meta"):
        fits = _measures(_create(other, found.patch)) == found
    return f"; encoder.name: {other} has these" * fits
