"""Weights files as people have them: read without executing pickle, found inside wrappers, named as timm names them.

What is no weights file, or is another model's, is said in two lines: what the file is, and what was expected.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from segmentation.data.file_kinds import HEAD, kind_of
from segmentation.files import no_file

State = dict[str, Tensor]

# The tensor that every ViT has, in the names of timm and the official release, and in those of Hugging Face's DINOv2.
_ANCHORS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
# A training's checkpoint holds several networks: what is meant to be used, or the only one.
_PREFERRED, _LAST = re.compile(r"(?<![a-z])(teacher|ema)(?![a-z])"), re.compile(r"student")
_HUGGING_FACE = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)
_QKV = ("query", "key", "value")


class NotWeightsError(ValueError):
    """A file that is no weights file; the text says what it is instead."""


def check_weights_file(path: Path) -> str:
    """Look at a file's first bytes; returns "safetensors" or "torch".

    Raises:
        NotWeightsError: it begins like something else.
        OSError: it cannot be read.
    """
    if found := no_file(path):
        raise NotWeightsError(found)
    with path.open("rb") as stream:
        head = stream.read(HEAD)
    if head[8:10] in (b'{"', b"{ ", b"{}"):  # after the header's length
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if head.startswith(b"\x80"):
        return "torch"  # before torch 1.6
    # both are protocol buffers, which begin with a small number: its version
    if path.suffix == ".onnx" or re.match(rb"\x08[\x03-\x1f]\x12.(pytorch|tf2onnx|onnx)", head, re.DOTALL):
        raise NotWeightsError("an ONNX file: a program with its weights")
    if path.suffix == ".pb" or re.match(rb"\x08\x01\x12", head):
        raise NotWeightsError("a TensorFlow SavedModel")
    raise NotWeightsError(kind_of(head) or f"no weights file that is known here ({path.stat().st_size:,} bytes)")


def read_weights(path: Path) -> dict[str, Any]:
    """The content of a safetensors file, or of one that torch saved; pickle is not executed.

    Raises:
        NotWeightsError: it is something else, damaged, or cannot be read without executing pickle.
        OSError: it cannot be read.
    """
    kind, size = check_weights_file(path), path.stat().st_size
    if kind == "safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            why = str(error).rpartition(": ")[2]
            raise NotWeightsError(f"a damaged safetensors file of {size:,} bytes ({why}); copy it again") from None
    try:
        # an open file: of a path, torch goes by the suffix; the warnings are of old pickle protocols, which it reads
        with path.open("rb") as stream, warnings.catch_warnings(action="ignore"):
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle.UnpicklingError and what corrupt pickles raise
        raise NotWeightsError(_why_not_unpickled(str(error), size)) from None
    if not isinstance(content, Mapping):
        raise NotWeightsError(f"a {type(content).__name__} that torch saved, without names of tensors")
    return dict(content)


def find_vit(content: Mapping[str, Any]) -> dict[str, Any]:
    """The ViT in a file's content, out of whatever wraps it, in the names of timm or of the official release.

    A teacher or an averaged copy is taken before a student. Content without any ViT is returned as it is.
    """
    flat = dict(_flatten(content))
    prefixes = {key.removesuffix(end) for key in flat for end in _ANCHORS if f".{key}".endswith(f".{end}")}
    if not prefixes:
        return dict(content)
    prefix = min(prefixes, key=lambda p: (not _PREFERRED.search(p), bool(_LAST.search(p)), len(p), p))
    if len(prefixes) > 1:
        others = ", ".join(other or "(no name)" for other in sorted(prefixes - {prefix}))
        print(f"encoder.checkpoint: note: it holds several ViTs; {prefix or '(no name)'} is taken, not {others}")
    state = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
    return _from_hugging_face(state) if _ANCHORS[1] in state else state


@dataclass(frozen=True)
class Measures:
    """What tells one ViT from another."""

    width: int
    depth: int
    patch: int
    registers: int

    def __str__(self) -> str:
        return (
            f"a ViT of width {self.width}, {self.depth} blocks, patch {self.patch}, {self.registers or 'no'} registers"
        )


def measure(state: Mapping[str, Any]) -> Measures | None:
    """The measures of a ViT by its tensors, None of what is none."""
    if _ANCHORS[0] not in state:
        return None
    weight = state[_ANCHORS[0]]
    patch = weight.shape[-1] if weight.ndim == 4 else math.isqrt(weight[0].numel() // 3)  # once a linear layer's
    depth = 1 + max((int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    registers = [state[key].shape[1] for key in ("reg_token", "register_tokens", "storage_tokens") if key in state]
    return Measures(weight.shape[0], depth, patch, sum(registers))


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")


def _from_hugging_face(state: State) -> State:
    """Hugging Face transformers' `Dinov2Model` (with or without registers) as the official release names it."""
    official: State = {}
    for key, value in state.items():
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)", key)
        if found is None:
            for pattern, name in _HUGGING_FACE:
                key = re.sub(pattern, name, key)
            official[key] = value
        elif found[2] == "query":  # all three at once; a missing one is missed below, with its name
            parts = [state.get(key.replace(".query.", f".{part}.")) for part in _QKV]
            present = [part for part in parts if part is not None]
            official[f"blocks.{found[1]}.attn.qkv.{found[3]}"] = torch.cat(present)
    official.setdefault("mask_token", torch.zeros(1))  # timm knows the official release by it
    return official


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        size = path.stat().st_size
        raise NotWeightsError(
            f"a damaged file of {size:,} bytes that torch saved, or another ZIP; copy it again"
        ) from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise NotWeightsError("a TorchScript program, and its weights are part of it")
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    if "model.weights.h5" in names:
        raise NotWeightsError("a Keras model")
    if names and all(name.endswith(".npy") for name in names):
        raise NotWeightsError("an archive of NumPy arrays")
    raise NotWeightsError(f"a ZIP archive ({', '.join(names[:3])}, …); unpack it")


def _why_not_unpickled(error: str, size: int) -> str:
    """Torch's reason, without its advice to execute what the file holds."""
    if found := re.search(r"Unsupported (?:global|class)[^\n]*?(?:GLOBAL )?([\w.]+\.\w+)", error):
        return f"a pickle with Python objects ({found[1]}) beside or around its tensors, which is not executed"
    if re.search(r"[Uu]nsupported|WeightsUnpickler", error):
        return "a pickle of other things than tensors, which is not executed"
    first = (error or "no reason given").splitlines()[0]
    return f"a damaged file of {size:,} bytes that torch saved ({first[:100]}); copy it again"
