import json
import math
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import LayerNorm2d
from torch.nn import functional as F

from segmentation.data.voc import CLASSES
from segmentation.errors import PipelineError
from segmentation.files import sha256_file, write_json
from segmentation.model import segmenter as model_files
from segmentation.model.decoder import LinearDecoder, UNetDecoder, upsample
from segmentation.model.encoder import Encoder, load_weights
from segmentation.model.segmenter import ModelCard, build
from segmentation.model.summary import summarise
from segmentation.settings import load_settings
from segmentation.training.loop import model_card

SMALL = "vit_small_patch14_dinov2"


def card(**changes) -> ModelCard:
    values = {
        "encoder": SMALL, "trainable_blocks": 1, "decoder": "unet", "decoder_channels": [32, 16, 8, 8],
        "decoder_norm": "batch", "skip_connections": [], "image_size": 56,
        "classes": ["background", "cat", "dog"], "encoder_weights": "random", "epoch": 1,
    }  # fmt: skip
    return ModelCard(**(values | changes))


def test_the_reports_shapes_at_518():
    with torch.device("meta"):
        encoder = Encoder("vit_base_patch14_dinov2", 518, 1)
        decoder = UNetDecoder(encoder.dim, 21, (512, 256, 128, 64))
        shapes = []
        for block in decoder.blocks:
            block.conv.register_forward_hook(lambda _m, i, o: shapes.append((i[0].shape[1], *o.shape[1:])))
        (tokens,) = encoder(torch.empty(2, 3, 518, 518))
        logits = decoder([tokens], (518, 518))
    assert tokens.shape == (2, 768, 37, 37)
    assert shapes == [(768, 512, 37, 37), (512, 256, 74, 74), (256, 128, 148, 148), (128, 64, 296, 296)]
    assert logits.shape == (2, 21, 518, 518)


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        (SMALL, 14),
        ("vit_small_patch14_reg4_dinov2", 14),
        ("vit_small_patch16_dinov3", 16),  # rotary embeddings
        ("vit_tiny_patch16_224", 16),
        ("vit_small_patch16_rope_mixed_224", 16),  # other ones in each block
    ],
)
@pytest.mark.parametrize(("trainable", "close"), [("all", {}), (1, {"rtol": 0, "atol": 5e-3})])
def test_the_encoder_equals_timms_own_forward(name, patch, trainable, close):
    """To float32's error, and to float16's where tokens between frozen and trained blocks are rounded to it."""
    torch.manual_seed(0)
    encoder = Encoder(name, 4 * patch, trainable, [5, 2]).eval()
    images = torch.randn(2, 3, 4 * patch, 4 * patch)
    with torch.no_grad():
        reference = encoder.vit.forward_features(images)[:, encoder.vit.num_prefix_tokens :]
        early = encoder.vit.forward_intermediates(images, indices=[2, 5], norm=True, intermediates_only=True)
        last, fifth, second = encoder(images)
        assert encoder(torch.randn(1, 3, 2 * patch, 6 * patch))[0].shape[2:] == (2, 6)
    assert last.shape == (2, encoder.dim, 4, 4)
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), reference, **close)
    torch.testing.assert_close([second, fifth], early, **close)


@pytest.mark.parametrize(
    "name", ["vit_giant_patch14_dinov2", "vit_base_patch14_reg4_dinov2", "vit_base_patch16_dinov3"]
)
def test_larger_encoders_are_built(name):
    with torch.device("meta"):
        encoder = Encoder(name, 224, 1)
        (tokens,) = encoder(torch.empty(1, 3, 224, 224))
    assert tokens.shape == (1, encoder.dim, 224 // encoder.patch, 224 // encoder.patch)


def test_only_the_last_block_and_the_decoder_are_trained():
    model = build(card())
    trained = {name.split(".")[1] if name.startswith("decoder") else ".".join(name.split(".")[:4])
               for name, parameter in model.named_parameters() if parameter.requires_grad}  # fmt: skip
    assert trained == {"encoder.vit.blocks.11", "blocks", "head"}


def test_frozen_parts_stay_in_eval_mode_and_take_no_gradient():
    model = build(card()).train()
    encoder = model.encoder
    assert [block.training for block in encoder.vit.blocks] == [False] * 11 + [True]
    assert not encoder.vit.norm.training
    assert model.decoder.training
    model(torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)).sum().backward()
    assert encoder.vit.patch_embed.proj.weight.grad is None
    assert encoder.vit.blocks[11].attn.qkv.weight.grad is not None


def test_trainable_blocks_sets_how_many_are_trained():
    assert not any(p.requires_grad for p in Encoder(SMALL, 56, 0).parameters())
    trained = {n.split(".")[2] for n, p in Encoder(SMALL, 56, 3).named_parameters() if p.requires_grad}
    assert trained == {"9", "10", "11"}
    with pytest.raises(PipelineError, match="has 12 blocks"):
        Encoder(SMALL, 56, 13)
    everything = Encoder(SMALL, 56, "all").train()
    assert all(p.requires_grad for p in everything.parameters())
    assert everything.vit.training
    everything(torch.randn(1, 3, 56, 56))[0].sum().backward()
    assert everything.vit.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_the_decoders_norm(norm):
    kinds = {"batch": torch.nn.BatchNorm2d, "group": torch.nn.GroupNorm, "layer": LayerNorm2d}
    model = build(card(decoder_norm=norm)).train()
    assert {type(block.norm) for block in model.decoder.blocks} == {kinds[norm]}
    images = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(model(images), alone, atol=1e-5) == (norm != "batch")


def test_skip_connections_bring_the_tokens_of_earlier_blocks():
    model = build(card(skip_connections=[8, 5, 2])).eval()
    assert [block.skip is not None for block in model.decoder.blocks] == [False, True, True, True]
    grids = [grid.requires_grad_() for grid in torch.randn(4, 1, 384, 4, 4)]
    logits = model.decoder(grids, (56, 56))
    assert logits.shape == (1, 3, 56, 56)
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(logits.sum(), grids))
    with pytest.raises(PipelineError, match=r"decoder.skip_connections: \[12\], but the blocks .* are 0 to 11"):
        build(card(skip_connections=[12]))


def test_the_linear_decoder_is_one_layer_on_the_tokens():
    model = build(card(decoder="linear")).eval()
    assert isinstance(model.decoder, LinearDecoder)
    assert [tuple(p.shape) for p in model.decoder.parameters()] == [(3, 384, 1, 1), (3,)]
    tokens, head = torch.randn(1, 384, 4, 4), model.decoder.head
    reference = torch.einsum("bdhw,cd->bchw", tokens, head.weight[:, :, 0, 0]) + head.bias.view(3, 1, 1)
    reference = F.interpolate(reference, size=(56, 56), mode="bilinear")
    torch.testing.assert_close(model.decoder([tokens], (56, 56)), reference, rtol=1e-4, atol=1e-5)
    assert model(torch.zeros(2, 3, 56, 56, dtype=torch.uint8)).shape == (2, 3, 56, 56)


def test_the_head_before_the_last_upsampling_gives_the_same_logits():
    torch.manual_seed(0)
    decoder = UNetDecoder(16, 5, (8, 8, 8, 6)).eval()
    tokens = torch.randn(2, 16, 4, 4)
    features = tokens
    for size, block in zip((8, 16, 32, 56), decoder.blocks, strict=True):
        features = upsample(F.relu(block.norm(block.conv(features))), (size, size))
    torch.testing.assert_close(decoder([tokens], (56, 56)), decoder.head(features), rtol=1e-5, atol=1e-6)


def test_normalisation_is_inside():
    model = build(card()).eval()
    image = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        reference = model.decoder(model.encoder((image / 255 - mean) / std), (56, 56))
        torch.testing.assert_close(model(image), reference, rtol=1e-4, atol=1e-4)


def test_a_wrong_shape_is_answered_with_the_mend():
    with pytest.raises(ValueError, match=r"\(1, 3, 60, 56\).*multiples of 14: resize"):
        build(card())(torch.zeros(1, 3, 60, 56))


def test_saved_and_loaded_again_it_predicts_the_same_bits(tmp_path):
    torch.manual_seed(0)
    model = build(card()).eval()
    model_files.save(model, card(), tmp_path)
    loaded, loaded_card = model_files.load(tmp_path)
    image = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
    assert loaded_card.classes == ["background", "cat", "dog"]


def test_weights_that_are_not_the_cards_are_refused(tmp_path):
    model_files.save(build(card()), card(), tmp_path)
    weights = tmp_path / "segmenter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(PipelineError, match="not the weights"):
        model_files.load(tmp_path)
    with pytest.raises(PipelineError, match=r"nowhere/segmenter.json: not found$"):
        model_files.load(tmp_path / "nowhere")


def test_weights_of_another_model_are_refused_in_a_line(tmp_path):
    model_files.save(build(card()), card(), tmp_path)
    described = json.loads((tmp_path / "segmenter.json").read_text())
    other = described | {"classes": ["background", "cat"]}
    (tmp_path / "segmenter.json").write_text(json.dumps(other))
    with pytest.raises(PipelineError, match=r"segmenter.safetensors: not of the model that segmenter.json describes$"):
        model_files.load(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_neither_written_nor_loaded(tmp_path, value):
    model = build(card())
    model_files.save(model, card(), tmp_path)
    weights, described = tmp_path / "segmenter.safetensors", json.loads((tmp_path / "segmenter.json").read_text())
    before = weights.read_bytes()
    with torch.no_grad():
        model.decoder.head.bias[0] = value
    with pytest.raises(
        PipelineError, match=r"decoder\.head\.bias: weights that are not finite .* so it is not written"
    ):
        model_files.save(model, card(), tmp_path)
    assert weights.read_bytes() == before
    save_file(model.state_dict(), weights)  # as another program would
    write_json(tmp_path / "segmenter.json", described | {"weights_sha256": sha256_file(weights)})
    with pytest.raises(
        PipelineError, match=r"segmenter\.safetensors: decoder\.head\.bias: weights that are not finite"
    ):
        model_files.load(tmp_path)


def official(vit: timm.models.VisionTransformer) -> dict[str, torch.Tensor]:
    """A state as in the official DINOv2 release: the same keys and a mask token beside them."""
    return {**vit.state_dict(), "mask_token": torch.zeros(1, vit.embed_dim)}


@pytest.mark.parametrize("kind", ["timm.safetensors", "timm.pth", "official.pth"])
def test_a_local_checkpoint_is_loaded(tmp_path, kind):
    source = timm.create_model(SMALL, img_size=518, num_classes=0)
    path = tmp_path / kind
    if kind.endswith("safetensors"):
        save_file(source.state_dict(), path)
    else:
        torch.save(official(source) if kind.startswith("official") else source.state_dict(), path)
    encoder = Encoder(SMALL, 518, "all")  # nothing is rounded between frozen and trained blocks
    load_weights(encoder, False, path)
    images = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        reference = source.eval().forward_features(images)[:, 1:]
        torch.testing.assert_close(encoder.eval()(images)[0].flatten(2).transpose(1, 2), reference)


def test_a_checkpoint_of_another_size_has_its_position_embedding_resampled(tmp_path):
    source = timm.create_model(SMALL, img_size=518, num_classes=0)
    torch.save(official(source), tmp_path / "x.pth")
    encoder = Encoder(SMALL, 56, 1)
    load_weights(encoder, False, tmp_path / "x.pth")
    assert encoder.vit.pos_embed.shape == (1, 17, 384)
    assert torch.equal(encoder.vit.cls_token, source.cls_token)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoints_pickle_is_never_executed(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    with path.open("wb") as stream:
        pickle.dump({"cls_token": Evil()}, stream)
    with pytest.raises(PipelineError, match=r"evil.pth"):
        load_weights(Encoder(SMALL, 56, 1), False, path)
    assert "executed" not in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), path)
    with pytest.raises(PipelineError, match=r"tiny.safetensors does not fit"):
        load_weights(Encoder(SMALL, 56, 1), False, path)


def test_pretrained_weights_that_cannot_be_had_are_an_error_with_remedies(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PipelineError, match=r"(?s)encoder.pretrained.*encoder.checkpoint.*pretrained: false"):
        load_weights(Encoder(SMALL, 56, 1), True, None)


def test_what_timm_refuses_is_one_message():
    with pytest.raises(PipelineError, match=r"encoder\.name: timm cannot build 'vit_base_patch14_dinov2' at -14"):
        Encoder("vit_base_patch14_dinov2", -14, 1)


def test_the_summary_is_the_reports_table(root):
    settings = load_settings(root / "params.yaml", {"encoder.pretrained": False})
    table = summarise(model_card(settings, list(CLASSES))).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in table if line.startswith(("encoder.", "decoder."))}
    decoder = {name: row[0] for name, row in rows.items() if name.startswith("decoder")}
    assert decoder == {
        "decoder.blocks.0.conv": "512×37×37", "decoder.blocks.0": "512×74×74",
        "decoder.blocks.1.conv": "256×74×74", "decoder.blocks.1": "256×148×148",
        "decoder.blocks.2.conv": "128×148×148", "decoder.blocks.2": "128×296×296",
        "decoder.blocks.3.conv": "64×296×296", "decoder.blocks.3": "64×296×296",
        "decoder.head": "21×296×296",
    }  # fmt: skip
    trained = {name for name, row in rows.items() if row[2] != "0" and not name.endswith(".conv")}
    assert trained == {"encoder.blocks.11", "decoder.head", *(f"decoder.blocks.{i}" for i in range(4))}
    assert "296 → 518" in table[-1]
