import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from segmentation import model as model_files
from segmentation.decoder import Decoder, upsample
from segmentation.encoder import Encoder, load_weights
from segmentation.errors import PipelineError
from segmentation.model import ModelCard, build

SMALL = "vit_small_patch14_dinov2"


def card(**changes) -> ModelCard:
    values = {
        "encoder": SMALL, "trainable_blocks": 1, "decoder_channels": [32, 16, 8, 8], "image_size": 56,
        "classes": ["background", "cat", "dog"], "encoder_weights": "random", "epoch": 1,
    }  # fmt: skip
    return ModelCard(**(values | changes))


def test_the_reports_shapes_at_518():
    with torch.device("meta"):
        encoder = Encoder("vit_base_patch14_dinov2", 518, 1)
        decoder = Decoder(encoder.dim, (512, 256, 128, 64), 21)
        shapes = []
        for block in decoder.blocks:
            block.conv.register_forward_hook(lambda _m, i, o: shapes.append((i[0].shape[1], *o.shape[1:])))
        tokens = encoder(torch.empty(2, 3, 518, 518))
        logits = decoder(tokens, (518, 518))
    assert tokens.shape == (2, 768, 37, 37)
    assert shapes == [(768, 512, 37, 37), (512, 256, 74, 74), (256, 128, 148, 148), (128, 64, 296, 296)]
    assert logits.shape == (2, 21, 518, 518)


def test_the_encoder_equals_timms_own_forward():
    torch.manual_seed(0)
    encoder = Encoder(SMALL, 56, 1).eval()
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        reference = encoder.vit.forward_features(images)[:, 1:]
        ours = encoder(images)
    assert ours.shape == (2, 384, 4, 4)
    torch.testing.assert_close(ours.flatten(2).transpose(1, 2), reference)


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


def test_the_head_before_the_last_upsampling_gives_the_same_logits():
    torch.manual_seed(0)
    decoder = Decoder(16, (8, 8, 8, 6), 5).eval()
    tokens = torch.randn(2, 16, 4, 4)
    features = tokens
    for size, block in zip((8, 16, 32, 56), decoder.blocks, strict=True):
        features = upsample(F.relu(block.norm(block.conv(features))), (size, size))
    torch.testing.assert_close(decoder(tokens, (56, 56)), decoder.head(features), rtol=1e-5, atol=1e-6)


def test_normalisation_is_inside():
    model = build(card()).eval()
    image = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        reference = model.decoder(model.encoder((image / 255 - mean) / std), (56, 56))
        torch.testing.assert_close(model(image), reference, rtol=1e-4, atol=1e-4)


def test_a_wrong_shape_is_answered_with_the_mend():
    with pytest.raises(ValueError, match=r"\(1, 3, 60, 56\).*\[B, 3, 56, 56\].*resize"):
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
    with pytest.raises(PipelineError, match="not found; run train"):
        model_files.load(tmp_path / "nowhere")


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
    encoder = Encoder(SMALL, 518, 1)
    load_weights(encoder, False, path)
    images = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        reference = source.eval().forward_features(images)[:, 1:]
        torch.testing.assert_close(encoder.eval()(images).flatten(2).transpose(1, 2), reference)


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


def test_an_unknown_encoder_names_the_nearest():
    with pytest.raises(PipelineError, match="vit_base_patch14_dinov2"):
        Encoder("vit_base_patch14_dino2", 56, 1)
    with pytest.raises(PipelineError, match=r"encoder\.name.*resnet18"):
        Encoder("resnet18", 56, 1)
