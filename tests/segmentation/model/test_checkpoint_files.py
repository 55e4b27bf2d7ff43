"""Weights files of other tools: what is in them is loaded to the bit, or said in two lines."""

import argparse
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from segmentation.errors import PipelineError
from segmentation.model.checkpoint_files import find_vit
from segmentation.model.encoder import Encoder, check_encoder, load_weights
from segmentation.settings import EncoderSettings

SMALL, REGISTERS = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
HEADS, DEPTH, WIDTH = 6, 12, 384


def hugging_face(registers: int = 0, grid: int = 4) -> dict[str, Tensor]:
    """A random state in the names and shapes of transformers' `Dinov2Model` ViT-S/14, written down from its code."""
    random = torch.Generator().manual_seed(registers)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) * 0.02

    def layer(name: str, out: int, of: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(out, of), f"{name}.bias": draw(out)}

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + draw(WIDTH), f"{name}.bias": draw(WIDTH)}

    state = {
        "embeddings.cls_token": draw(1, 1, WIDTH),
        "embeddings.mask_token": draw(1, WIDTH),
        "embeddings.position_embeddings": draw(1, grid * grid + 1, WIDTH),
        "embeddings.patch_embeddings.projection.weight": draw(WIDTH, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": draw(WIDTH),
        **norm("layernorm"),
    }
    if registers:
        state["embeddings.register_tokens"] = draw(1, registers, WIDTH)
    for i in range(DEPTH):
        at = f"encoder.layer.{i}."
        for name in ("query", "key", "value"):
            state |= layer(f"{at}attention.attention.{name}", WIDTH, WIDTH)
        state |= layer(f"{at}attention.output.dense", WIDTH, WIDTH) | norm(f"{at}norm1") | norm(f"{at}norm2")
        state |= layer(f"{at}mlp.fc1", 4 * WIDTH, WIDTH) | layer(f"{at}mlp.fc2", WIDTH, 4 * WIDTH)
        state |= {f"{at}layer_scale{k}.lambda1": 1 + draw(WIDTH) for k in (1, 2)}
    return state


def hugging_face_tokens(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """What `Dinov2Model` makes of images of its own size, step by step as in its code: patches `[B, N, D]`."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    projection = "embeddings.patch_embeddings.projection"
    patches = F.conv2d(images, state[f"{projection}.weight"], state[f"{projection}.bias"], stride=14)
    x = torch.cat([state["embeddings.cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], 1)
    x = x + state["embeddings.position_embeddings"]
    registers = state.get("embeddings.register_tokens", torch.zeros(1, 0, WIDTH)).expand(len(images), -1, -1)
    x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)
    for i in range(DEPTH):
        at = f"encoder.layer.{i}."
        y = norm(x, f"{at}norm1")
        query, key, value = (
            linear(y, f"{at}attention.attention.{name}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = (query @ key.mT / (WIDTH // HEADS) ** 0.5).softmax(-1) @ value
        mixed = linear(mixed.transpose(1, 2).flatten(2), f"{at}attention.output.dense")
        x = x + mixed * state[f"{at}layer_scale1.lambda1"]
        y = linear(F.gelu(linear(norm(x, f"{at}norm2"), f"{at}mlp.fc1")), f"{at}mlp.fc2")
        x = x + y * state[f"{at}layer_scale2.lambda1"]
    return norm(x, "layernorm")[:, 1 + registers.shape[1] :]


def loaded(path: Path, name: str = SMALL) -> Encoder:
    encoder = Encoder(name, 56, "all")  # nothing is rounded between frozen and trained blocks
    load_weights(encoder, False, path)
    return encoder.eval()


@pytest.mark.parametrize(("name", "registers"), [(SMALL, 0), (REGISTERS, 4)])
def test_weights_in_hugging_faces_names_give_hugging_faces_tokens(name, registers, tmp_path):
    state, path = hugging_face(registers), tmp_path / "model.safetensors"
    save_file({f"dinov2.{key}": value for key, value in state.items()} | {"classifier.bias": torch.zeros(2)}, path)
    encoder, images = loaded(path, name), torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = encoder(images)[0].flatten(2).mT
    expected = hugging_face_tokens(state, images)
    assert expected.std() > 0.1
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


def test_weights_in_hugging_faces_names_equal_those_in_timms_tensor_by_tensor(tmp_path):
    state = hugging_face()
    save_file(state, tmp_path / "hf.safetensors")
    found = loaded(tmp_path / "hf.safetensors").vit.state_dict()
    at, parts = "encoder.layer.7.", ("query", "key", "value")
    expected = {
        "blocks.7.attn.qkv.weight": torch.cat([state[f"{at}attention.attention.{part}.weight"] for part in parts]),
        "blocks.7.attn.qkv.bias": torch.cat([state[f"{at}attention.attention.{part}.bias"] for part in parts]),
        "blocks.7.attn.proj.weight": state[f"{at}attention.output.dense.weight"],
        "blocks.7.ls1.gamma": state[f"{at}layer_scale1.lambda1"],
        "blocks.7.ls2.gamma": state[f"{at}layer_scale2.lambda1"],
        "blocks.7.norm2.bias": state[f"{at}norm2.bias"],
        "blocks.7.mlp.fc2.weight": state[f"{at}mlp.fc2.weight"],
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "norm.weight": state["layernorm.weight"],
    }
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return timm.create_model(SMALL, img_size=56, num_classes=0).state_dict()


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


WRAPPERS = {
    "data parallel": lambda w: prefixed("module.", w),
    "model": lambda w: {"model": w, "epoch": 3},
    "model, data parallel": lambda w: {"model": prefixed("module.", w), "optimizer": {"state": {0: {"step": 1}}}},
    "Lightning": lambda w: {
        "state_dict": prefixed("model.encoder.vit.", w),
        "pytorch-lightning_version": "2.6",
        "loops": {},
    },
    "a segmenter of ours": lambda w: prefixed("encoder.vit.", w) | {"decoder.head.weight": torch.zeros(2, 384, 1, 1)},
    "DINOv2 training": lambda w: {
        "student": prefixed("backbone.", blank(w)),
        "teacher": prefixed("backbone.", w | {"mask_token": torch.zeros(1, 384)})
        | {"dino_head.mlp.0.weight": torch.zeros(2)},
    },
    "DINO training": lambda w: {"student": prefixed("module.backbone.", blank(w)), "teacher": prefixed("backbone.", w)},
    "flat teacher": lambda w: prefixed("student.", blank(w)) | prefixed("teacher.", w),
    "averaged": lambda w: {"state_dict": blank(w), "state_dict_ema": w},
}


def blank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_found_in_what_wraps_them(wrapper, weights):
    found = find_vit(WRAPPERS[wrapper](weights))
    assert {key for key in found if key != "mask_token"} == set(weights)
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_a_teacher_that_torch_saved_is_loaded(tmp_path, weights):
    torch.save(WRAPPERS["DINOv2 training"](weights), tmp_path / "teacher.pth")
    found = loaded(tmp_path / "teacher.pth").vit.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def refusal(path: Path, name: str = SMALL) -> str:
    with pytest.raises(PipelineError) as raised:
        load_weights(Encoder(name, 56, 1), False, path)
    said = str(raised.value)
    assert said.startswith(f"encoder.checkpoint: {path}")
    assert len(said.splitlines()) == 2, said
    assert "expected: " in said.splitlines()[1]
    assert len(said) < 600 + len(str(path))
    assert "weights_only" not in said
    return said


@pytest.mark.parametrize(
    ("other", "found", "advice"),
    [
        ("vit_tiny_patch16_224", "a ViT of width 192, 12 blocks, patch 16, no registers", None),
        (REGISTERS, "a ViT of width 384, 12 blocks, patch 14, 4 registers", f"encoder.name: {REGISTERS} has these"),
        (
            "vit_base_patch14_dinov2",
            "a ViT of width 768, 12 blocks, patch 14, no registers",
            "encoder.name: vit_base_patch14_dinov2 has these",
        ),
        ("resnet10t", "84 entries, bn1.bias, bn1.num_batches_tracked, bn1.running_mean, …", None),
    ],
)
def test_another_model_is_told_by_its_measures(other, found, advice, tmp_path):
    save_file(timm.create_model(other, num_classes=0).state_dict(), tmp_path / "x.safetensors")
    said = refusal(tmp_path / "x.safetensors")
    assert f"x.safetensors does not fit {SMALL}: it holds {found}\n" in said
    assert "expected: a ViT of width 384, 12 blocks, patch 14, no registers" in said
    assert ("encoder.name" in said) == (advice is not None)
    assert advice is None or advice in said


def test_of_several_vits_it_is_said_which_is_taken(tmp_path, weights, capsys):
    torch.save({"model": weights, "modelEma": weights}, tmp_path / "x.pth")
    assert find_vit(torch.load(tmp_path / "x.pth")).keys() == weights.keys()
    assert "it holds several ViTs; model. is taken, not modelEma." in capsys.readouterr().out


def test_whole_numbers_are_no_weights(tmp_path, weights):
    save_file({key: value.to(torch.int8) for key, value in weights.items()}, tmp_path / "x.safetensors")
    assert "whole numbers in " in refusal(tmp_path / "x.safetensors")


def test_tensors_that_are_missing_or_too_many_are_named(tmp_path, weights):
    odd = {key: value for key, value in weights.items() if ".ls1." not in key} | {"extra.weight": torch.zeros(1)}
    odd["norm.weight"] = torch.zeros(7)
    save_file(odd, tmp_path / "x.safetensors")
    said = refusal(tmp_path / "x.safetensors")
    assert "without blocks.0.ls1.gamma and 11 more, with extra.weight, of another shape in norm.weight\n" in said
    state = hugging_face()
    del state["encoder.layer.3.attention.attention.key.bias"]
    save_file(state, tmp_path / "hf.safetensors")
    assert "of another shape in blocks.3.attn.qkv.bias\n" in refusal(tmp_path / "hf.safetensors")


def torch_saved(content: object, keep: int | None = None) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()[:keep]


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, weight=np.zeros(3))
    return stream.getvalue()


HEADER = json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
NOT_WEIGHTS = {
    "empty.pth": (b"", "an empty file"),
    "zeros.pth": (bytes(999), "a file of zeros"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 88\n", "a Git LFS pointer"),
    "page.pth": (b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title>", "an HTML page"),
    "error.json": (b'{"error": "Repository not found"}', "a JSON file"),
    "text.pth": (b"not yet downloaded", "no weights file that is known here (18 bytes)"),
    "photo.pth": (b"\xff\xd8\xff\xe0 and so on", "a JPEG"),
    "archive.tar.gz": (b"\x1f\x8b\x08\0\0", "a gzip archive"),
    "model.zip": (
        zipped("readme.txt", "weights/model.safetensors"),
        "a ZIP archive (readme.txt, weights/model.safetensors",
    ),
    "model.keras": (zipped("metadata.json", "model.weights.h5"), "a Keras model"),
    "scripted.pt": (zipped("m/data.pkl", "m/constants.pkl"), "a TorchScript program"),
    "jax.npz": (npz(), "an archive of NumPy arrays"),
    "model.h5": (b"\x89HDF\r\n\x1a\n rest", "an HDF5 file, as TensorFlow and Keras write it"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.0.1:", "an ONNX file"),
    "export.bin": (b"\x08\x08\x12\x07pytorch\x1a\x052.0.1:", "an ONNX file"),
    "saved_model.pb": (b"\x08\x01\x12\xd7\x9e\x02\n", "a TensorFlow SavedModel"),
    "model.gguf": (b"GGUF\x03\0\0\0", "a GGUF file"),
    "cut.safetensors": (
        len(HEADER).to_bytes(8, "little") + HEADER + b"1234",
        "a damaged safetensors file of 74 bytes (incomplete metadata, file not fully covered)",
    ),
    "cut.pth": (torch_saved({"a": torch.zeros(999)}, 2000), "a damaged file of 2,000 bytes that torch saved"),
    "cut.pkl": (b"\x80\x02}q\x00", "a damaged file of 5 bytes that torch saved"),
    "module.pth": (torch_saved(torch.nn.Linear(2, 2)), "a pickle with Python objects (torch.nn.modules.linear.Linear)"),
    "lightning.ckpt": (
        torch_saved({"state_dict": {}, "hyper_parameters": argparse.Namespace(lr=1)}),
        "a pickle with Python objects (argparse.Namespace)",
    ),
    "plain.pkl": (pickle.dumps({"a": np.zeros(3)}, protocol=2), "a pickle with Python objects (numpy"),
    "sklearn.pkl": (pickle.dumps({"a": print}), "a pickle of other things than tensors, which is not executed"),
    "list.pth": (torch_saved([torch.zeros(3)]), "a list that torch saved, without names of tensors"),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_is_no_weights_file_is_called_what_it_is(name, tmp_path):
    content, kind = NOT_WEIGHTS[name]
    (tmp_path / name).write_bytes(content)
    first, second = refusal(tmp_path / name).splitlines()
    assert first.startswith(f"encoder.checkpoint: {tmp_path / name}: {kind}")
    assert second == (
        f"  expected: the tensors of {SMALL} alone, .safetensors or .pth, in the names of timm, of the official DINOv2 "
        "release or of Hugging Face's Dinov2Model"
    )


def test_a_file_is_known_by_its_content_and_not_by_its_name(tmp_path, weights):
    save_file(weights, tmp_path / "pytorch_model.bin")
    torch.save(weights, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors"):
        assert torch.equal(loaded(tmp_path / name).vit.cls_token, weights["cls_token"])


def test_what_is_no_weights_file_shows_before_data_are_fetched(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "page.pth").write_text("<html>")
    cases = {
        "gone.pth": "not found",
        "pipe.pth": "a pipe, not a file",
        ".": "a folder, not a file",
        "page.pth": "an HTML page",
    }
    for name, why in cases.items():
        checkpoint = str(tmp_path / name)
        settings = EncoderSettings(name=SMALL, pretrained=True, checkpoint=checkpoint, trainable_blocks=1)
        with pytest.raises(PipelineError, match=f"encoder.checkpoint: .*: {why}"):
            check_encoder(settings, 56, [])
