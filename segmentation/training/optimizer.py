"""AdamW's parameter groups, the learning-rate schedule, averaged weights, and the precision of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)
from torch.optim.swa_utils import get_ema_multi_avg_fn

from segmentation.model.segmenter import Segmenter


def parameter_groups(model: Segmenter, lr: float, encoder_lr_scale: float, layer_decay: float) -> list[dict[str, Any]]:
    """The trained parameters by learning rate, decoder first.

    The decoder has `lr`; encoder block `i` of `n` has `lr · encoder_lr_scale · layer_decay^(n − 1 − i)`; what lies
    before the first block is one step further, the final norm goes with the last block.
    """
    depth = len(model.encoder.vit.blocks)
    groups: dict[float, list[Tensor]] = {}
    named = [*model.decoder.named_parameters(prefix="decoder"), *model.encoder.vit.named_parameters()]
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if not name.startswith("decoder."):
            first, _, rest = name.partition(".")
            block = int(rest.split(".")[0]) if first == "blocks" else depth - 1 if first == "norm" else -1
            scale = encoder_lr_scale * layer_decay ** (depth - 1 - block)
        groups.setdefault(scale, []).append(parameter)
    return [{"params": parameters, "lr": lr * scale} for scale, parameters in groups.items()]


def optimiser(
    model: Segmenter, lr: float, weight_decay: float, encoder_lr_scale: float, layer_decay: float
) -> Optimizer:
    """AdamW over `parameter_groups`."""
    groups = parameter_groups(model, lr, encoder_lr_scale, layer_decay)
    return AdamW(groups, weight_decay=weight_decay, fused=True)


def schedule(optimizer: Optimizer, name: str, steps: int, warmup_steps: int) -> LRScheduler:
    """A learning rate a step, as a share of each group's own; torch's schedulers.

    Args:
        optimizer: as `optimiser` gives it.
        name: `constant`; `cosine` to 0; `poly`, (1 − step / steps)^0.9; `onecycle`, torch's defaults.
        steps: optimiser steps of the whole training.
        warmup_steps: of them, those of a linear warm-up; not for `onecycle`.
    """
    if name == "onecycle":
        return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps)
    left = max(1, steps - warmup_steps)
    main: LRScheduler
    if name == "cosine":
        main = CosineAnnealingLR(optimizer, left)
    elif name == "poly":
        main = PolynomialLR(optimizer, left, power=0.9)
    else:
        main = ConstantLR(optimizer, factor=1.0)
    if not warmup_steps:
        return main
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, main], milestones=[warmup_steps])


def precision() -> Literal["bf16-mixed", "32-true"]:
    """Lightning's name for what training computes in: bfloat16 where the device has it in hardware.

    Weights, their averages, the optimiser's state and losses stay in float32. Devices that only emulate bfloat16 are
    faster in float32.
    """
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = found.get("avx512_bf16", False) or found.get("amx_bf16", False)
    return "bf16-mixed" if native else "32-true"


class AveragedWeights:
    """Exponential moving average of a model's trained weights and its batch statistics.

    Args:
        values: what is averaged, by name; the first average is a copy of it.
        decay: share of the average that a step keeps; smaller in the first steps, as in timm's `ModelEmaV3`.
    """

    def __init__(self, values: Mapping[str, Tensor], decay: float) -> None:
        self.average = {name: value.detach().clone() for name, value in values.items()}
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor]) -> None:
        """Take in the values after an optimiser step; integers, such as batch counters, are copied."""
        self._follow(values)
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        pairs = [(self.average[name], value.detach()) for name, value in values.items()]
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        for mine, value in pairs:
            if not mine.is_floating_point():
                mine.copy_(value)
        get_ema_multi_avg_fn(decay)([mine for mine, _ in floating], [value for _, value in floating], self.steps)

    @torch.no_grad()
    def swap(self, values: Mapping[str, Tensor]) -> None:
        """Exchange the average with the values, in place; twice changes nothing."""
        self._follow(values)
        for name, value in values.items():
            mine = self.average[name].clone()
            self.average[name].copy_(value)
            value.copy_(mine)

    def _follow(self, values: Mapping[str, Tensor]) -> None:
        """Move to where the values are: Lightning takes the model to the GPU after this object was made."""
        self.average = {name: value.to(values[name].device) for name, value in self.average.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.steps = state["steps"]
