import pytest
import torch
from segmentation_models_pytorch.losses import LovaszLoss

from segmentation.training.losses import cross_entropy, dice, focal, lovasz_softmax, median_frequency_weights

reference = LovaszLoss("multiclass", ignore_index=255)


def value_and_gradient(loss, logits, mask):
    logits = logits.clone().requires_grad_()
    value = loss(logits, mask)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def assert_close_to_the_reference(logits, mask):
    (value, gradient), (expected, wanted) = (value_and_gradient(f, logits, mask) for f in (lovasz_softmax, reference))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten().double(), wanted.flatten().double(), dim=0)
    assert cosine > 0.9999
    assert gradient.norm() == pytest.approx(wanted.norm().item(), rel=1e-3)


def random_case(seed: int, classes: int = 21, size: int = 40):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, classes, size, size, generator=generator)
    mask = torch.randint(0, classes, (2, size, size), generator=generator)
    mask[torch.rand(mask.shape, generator=generator) < 0.1] = 255
    return logits, mask


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_reference_in_value_and_gradient_with_void(seed):
    assert_close_to_the_reference(*random_case(seed))


def test_equals_the_reference_on_real_masks(voc_subset):
    from segmentation.data.images import read_mask, resize_mask
    from segmentation.data.voc import VocFolder

    folder = VocFolder(voc_subset)
    masks = [resize_mask(read_mask(folder.mask(name)), 112) for name in folder.ids("val")[:4]]
    mask = torch.stack([torch.tensor(m) for m in masks])
    assert (mask == 255).any()
    logits = torch.nn.functional.one_hot(mask.long() % 255, 21).movedim(-1, 1) * 2.0 + torch.randn(4, 21, 112, 112)
    assert_close_to_the_reference(logits, mask)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 30.0])
@pytest.mark.parametrize("size", [3, 40])
def test_the_order_lost_within_a_bin_of_errors_costs_little(size, scale):
    """Flat, usual and saturated probabilities, hopeless and nearly right; smallest masks have bins of one pixel."""
    for seed in range(4):
        logits, mask = random_case(seed, size=size)
        truth = torch.nn.functional.one_hot(mask % 255, 21).movedim(-1, 1)
        for case in (scale * logits / 3, scale * (logits / 3 + 2 * truth)):
            ours, wanted = (value_and_gradient(loss, case, mask) for loss in (lovasz_softmax, reference))
            torch.testing.assert_close(ours[0], wanted[0], rtol=3e-5, atol=1e-6)


def test_by_hand():
    """Two pixels of class 0 with errors 1/4 and 3/4, one of class 1 with error 1/2."""
    probabilities = torch.tensor([[0.75, 0.25, 0.5], [0.25, 0.75, 0.5]])
    logits, mask = probabilities.log().view(1, 2, 1, 3), torch.tensor([[[0, 0, 1]]])
    # class 0: errors 3/4 (its own), 1/2 (not), 1/4 (its own) bring the Jaccard loss to 1/2, 2/3, 1
    # class 1: errors 3/4 (not), 1/2 (its own), 1/4 (not) bring it to 1/2, 1, 1
    zero = 0.75 * 1 / 2 + 0.5 * (2 / 3 - 1 / 2) + 0.25 * (1 - 2 / 3)
    one = 0.75 * 1 / 2 + 0.5 * (1 - 1 / 2)
    assert lovasz_softmax(logits, mask).item() == pytest.approx((zero + one) / 2, abs=1e-6)


def test_void_pixels_take_no_gradient():
    logits, mask = random_case(7)
    _, gradient = value_and_gradient(lovasz_softmax, logits, mask)
    assert gradient.movedim(1, 0)[:, mask == 255].abs().max() == 0
    assert gradient.movedim(1, 0)[:, mask != 255].abs().max() > 0


def test_one_class_only_equals_the_reference():
    logits, mask = random_case(3)
    mask[mask != 255] = 5
    torch.testing.assert_close(lovasz_softmax(logits, mask), reference(logits, mask))


def test_all_void_is_zero_with_a_zero_gradient():
    logits, mask = random_case(3)
    value, gradient = value_and_gradient(lovasz_softmax, logits, torch.full_like(mask, 255))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_everything():
    _, mask = random_case(1)
    truth = torch.nn.functional.one_hot(mask % 255, 21).movedim(-1, 1).float()
    assert lovasz_softmax(100 * truth, mask) < 1e-6
    assert lovasz_softmax(100 * truth.roll(1, dims=1), mask) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, mask = random_case(2)
    half = logits.to(dtype)
    assert lovasz_softmax(half, mask).dtype == torch.float32
    torch.testing.assert_close(lovasz_softmax(half, mask), lovasz_softmax(half.float(), mask))


def test_byte_masks_mean_the_same_as_integer_ones():
    logits, mask = random_case(4)
    assert lovasz_softmax(logits, mask.to(torch.uint8)) == lovasz_softmax(logits, mask)


def test_cross_entropy_equals_torchs_with_void_and_is_zero_where_all_is_void():
    logits, mask = random_case(5)
    torch.testing.assert_close(
        cross_entropy(logits, mask), torch.nn.functional.cross_entropy(logits, mask, ignore_index=255)
    )
    value, gradient = value_and_gradient(cross_entropy, logits, torch.full_like(mask, 255))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def dice_by_hand(logits, mask):
    valid = (mask != 255).float()
    scores = []
    for label in range(logits.shape[1]):
        truth = (mask == label).float()
        probability = logits.softmax(1)[:, label] * valid
        if truth.sum() == 0:
            scores.append(torch.tensor(0.0))
        else:
            scores.append(1 - 2 * (truth * probability).sum() / (truth.sum() + probability.sum()))
    return torch.stack(scores).mean()


def focal_by_hand(logits, mask):
    values = []
    for label in range(logits.shape[1]):
        score = logits[:, label][mask != 255].sigmoid()
        truth = (mask == label)[mask != 255]
        right = torch.where(truth, score, 1 - score)
        values.append(-((1 - right) ** 2 * right.log()).mean())
    return torch.stack(values).mean()


@pytest.mark.parametrize(("loss", "by_hand"), [(dice, dice_by_hand), (focal, focal_by_hand)])
@pytest.mark.parametrize("only", [None, 5])
def test_dice_and_focal_are_what_they_are_by_hand_with_void(loss, by_hand, only):
    logits, mask = random_case(6)
    if only is not None:
        mask[mask != 255] = only
    ours, reference_ = value_and_gradient(loss, logits, mask), value_and_gradient(by_hand, logits, mask)
    torch.testing.assert_close(ours[0], reference_[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1], reference_[1], rtol=1e-3, atol=1e-7)
    assert ours[1].movedim(1, 0)[:, mask == 255].abs().max() == 0


@pytest.mark.parametrize("loss", [lovasz_softmax, cross_entropy, dice, focal])
def test_every_loss_with_all_void_and_in_bf16(loss):
    logits, mask = random_case(8)
    value, gradient = value_and_gradient(loss, logits, torch.full_like(mask, 255))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    half = logits.bfloat16()
    assert loss(half, mask).dtype == torch.float32
    torch.testing.assert_close(loss(half, mask), loss(half.float(), mask))
    assert loss(logits, mask.to(torch.uint8)) == loss(logits, mask)


def test_class_weights_equal_torchs_weighted_mean():
    logits, mask = random_case(9)
    weights = torch.rand(21) + 0.1
    reference_ = torch.nn.functional.cross_entropy(logits, mask, weights, ignore_index=255)
    torch.testing.assert_close(cross_entropy(logits, mask, weights), reference_)
    assert cross_entropy(logits, mask, weights) != cross_entropy(logits, mask)


def test_median_frequency_weights_by_hand():
    """Class 0 and 3 are in both photos, 1 in the first alone, 2 in none."""
    weights = median_frequency_weights(torch.tensor([[500, 400, 0, 100], [1100, 0, 0, 100]]))
    frequency = [1600 / 2200, 400 / 1000, 200 / 2200]
    assert weights.tolist() == pytest.approx([0.4 / frequency[0], 1.0, 0.0, 0.4 / frequency[2]])


@pytest.mark.parametrize("loss", [lovasz_softmax, cross_entropy, dice, focal])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("void", [False, True])
def test_of_logits_that_are_not_finite_no_loss_is(loss, value, void):
    logits, mask = random_case(0, size=8)
    logits[0, 3, 2, 2] = value
    if void:
        mask[:] = 255
    assert not torch.isfinite(loss(logits, mask))
