import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from segmentation.model.segmenter import ModelCard, build
from segmentation.training.optimizer import AveragedWeights, parameter_groups, schedule


def model(trainable_blocks):
    return build(
        ModelCard(
            encoder="vit_small_patch14_dinov2", trainable_blocks=trainable_blocks, decoder="linear",
            decoder_channels=[8, 8, 8, 8], decoder_norm="batch", skip_connections=[], image_size=28,
            classes=["background", "cat"], encoder_weights="random", epoch=0,
        )
    )  # fmt: skip


def rates(model, *arguments) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, *arguments)
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


def test_every_trained_parameter_has_one_rate_and_no_frozen_one_has():
    small = model(2)
    found = rates(small, 1e-3, 1.0, 1.0)
    assert set(found) == {name for name, parameter in small.named_parameters() if parameter.requires_grad}
    assert set(found.values()) == {1e-3}


def test_layer_decay_and_encoder_scale_by_hand():
    found = rates(model("all"), 1.0, 0.1, 0.5)
    assert found["decoder.head.weight"] == 1.0
    assert found["encoder.vit.blocks.11.attn.qkv.weight"] == pytest.approx(0.1)
    assert found["encoder.vit.norm.weight"] == pytest.approx(0.1)
    assert found["encoder.vit.blocks.9.mlp.fc1.bias"] == pytest.approx(0.1 * 0.25)
    assert found["encoder.vit.patch_embed.proj.weight"] == pytest.approx(0.1 * 0.5**12)
    assert found["encoder.vit.pos_embed"] == found["encoder.vit.patch_embed.proj.weight"]


def curve(name: str, steps: int = 20, warmup: int = 0) -> list[float]:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, name, steps, warmup)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_schedules_by_hand():
    cosine = [(1 + torch.cos(torch.tensor(torch.pi * t / 20)).item()) / 2 for t in range(20)]
    assert curve("constant") == [1.0] * 20
    assert curve("cosine") == pytest.approx(cosine, abs=1e-6)
    assert curve("poly") == pytest.approx([(1 - t / 20) ** 0.9 for t in range(20)])
    one = curve("onecycle")
    assert max(one) == pytest.approx(1.0, abs=0.05)
    assert one[0] < 0.05
    assert one[-1] < 1e-3


@pytest.mark.parametrize("name", ["constant", "cosine", "poly"])
def test_warm_up_rises_in_a_line_and_the_rest_follows(name):
    values = curve(name, 20, warmup=4)
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert values[4:] == pytest.approx(curve(name, 16))


def test_averaged_weights_equal_torchs_average():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ours = AveragedWeights(net.state_dict(), 0.5)
    reference = AveragedModel(net, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    reference.update_parameters(net)  # torch's first update copies
    for step in range(1, 30):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        net(torch.randn(5, 3))
        ours.update(net.state_dict())
        reference.avg_fn = get_ema_avg_fn(min(0.5, (1 + step) / (10 + step)))
        reference.update_parameters(net)
    for name, value in reference.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ours.average[name], value)
    assert ours.average["1.num_batches_tracked"] == net[1].num_batches_tracked


def test_swapping_twice_changes_nothing():
    net = nn.Linear(2, 2)
    averaged = AveragedWeights(net.state_dict(), 0.9)
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1)
    averaged.swap(net.state_dict())
    assert torch.equal(net.weight, before)
    averaged.swap(net.state_dict())
    assert torch.equal(net.weight, before + 1)
