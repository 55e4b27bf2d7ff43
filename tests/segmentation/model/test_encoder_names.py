import pytest
import torch

from segmentation.errors import PipelineError
from segmentation.model.encoder import Encoder
from segmentation.model.encoder_names import buildable, check_name, nearest


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("vit_smal_patch14_dinov2", "vit_small_patch14_dinov2"),
        ("vit_bas_patch14_dinov2", "vit_base_patch14_dinov2"),
        ("vit_larg_patch14_dinov2", "vit_large_patch14_dinov2"),
        ("vit_base_patch14_dino2", "vit_base_patch14_dinov2"),
        ("vit_small_patch14_dino2", "vit_small_patch14_dinov2"),
        ("vit_small_patch16_dino", "vit_small_patch16_dinov3"),
        ("vit_base_patch14_dinov3", "vit_base_patch16_dinov3"),
        ("vit_base_patch16_dinov2", "vit_base_patch14_dinov2"),
        ("vit_giant_patch14_dinov3", "vit_giant_patch14_dinov2"),
        ("vit_base_dinov2", "vit_base_patch14_dinov2"),
        ("vit_large_patch14", "vit_large_patch14_dinov2"),
        ("vit_7b_dinov3", "vit_7b_patch16_dinov3"),
        ("dinov2", "vit_base_patch14_dinov2"),
        ("dinov2-base", "vit_base_patch14_dinov2"),
        ("dinov2_small", "vit_small_patch14_dinov2"),
        ("facebook/dinov2-base", "vit_base_patch14_dinov2"),
        ("facebook/dinov3-vitb16-pretrain-lvd1689m", "vit_base_patch16_dinov3"),
        ("dinov2_vits14", "vit_small_patch14_dinov2"),
        ("dinov2_vitl14_reg4", "vit_large_patch14_reg4_dinov2"),
        ("dinov2_vitb14_reg", "vit_base_patch14_reg4_dinov2"),
        ("dinov3_vits16", "vit_small_patch16_dinov3"),
        ("ViT-B/14", "vit_base_patch14_dinov2"),
        ("vit_b_16", "vit_base_patch16_224"),
        ("openai/clip-vit-base-patch32", "vit_base_patch32_clip_224"),
        ("google/siglip-so400m-patch14-384", "vit_so400m_patch14_siglip_384"),
        ("vit_so400_patch14_siglip", "vit_so400m_patch14_siglip_224"),
        ("eva02_base", "eva02_base_patch14_224"),
        ("unet", "vit_base_patch14_dinov2"),
    ],
)
def test_an_unknown_name_gets_the_nearest_of_its_size_and_family(written, meant):
    with pytest.raises(PipelineError) as refusal:
        check_name(written)
    assert str(refusal.value) == f"encoder.name: timm knows no {written!r}; the nearest is {meant}"


@pytest.mark.parametrize(
    ("written", "write"),
    [
        ("VIT_Base_patch14_DINOv2", "vit_base_patch14_dinov2"),
        ("hf-hub:timm/vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m"),
        ("hf_hub:timm/vit_small_patch14_dinov2", "vit_small_patch14_dinov2"),
        ("timm/vit_base_patch14_dinov2.lvd142m", "vit_base_patch14_dinov2.lvd142m"),
    ],
)
def test_a_name_in_another_spelling_is_spelled_out(written, write):
    with pytest.raises(PipelineError, match=f"write {write} instead of "):
        check_name(written)


def test_another_kind_of_model_is_no_plain_vit():
    for name in ("resnet18", "swin_base_patch4_window7_224", "convnext_base.fb_in1k"):
        with pytest.raises(PipelineError, match="no plain ViT with patch tokens; try vit_base_patch14_dinov2"):
            check_name(name)


def test_wrong_weights_of_a_right_encoder_get_those_that_there_are():
    check_name("vit_base_patch14_dinov2.lvd142m")
    with pytest.raises(PipelineError, match="has no weights 'lvd142'; it has lvd142m"):
        check_name("vit_base_patch14_dinov2.lvd142")
    with pytest.raises(PipelineError, match="has no weights 'x'; it has none"):
        check_name("vit_giant_patch14_224.x")


@pytest.mark.slow
def test_every_name_that_is_suggested_can_be_built():
    for size in ("tiny", "small", "base", "large", "giant", "so400m"):
        for family in ("dinov2", "dinov3", "clip", "siglip", "tipsv2", "augreg"):
            name = nearest(f"{family}-{size}")
            assert name in buildable()
            side = 112 if "patch14" in name else 128
            with torch.device("meta"):
                assert Encoder(name, side, 1).patch
