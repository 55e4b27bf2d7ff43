"""The Lovász-Softmax loss, forward and backward, against segmentation-models-pytorch's and kornia's, on real masks.

Logits [2, 21, 518, 518]: random ones, smooth ones (a decoder's at its start) and nearly right ones. kornia's knows no
void, so it gets masks with void as background, and its value is not compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from kornia.losses import lovasz_softmax_loss
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor
from torch.nn import functional as F

from benchmarks.side_by_side import compare, parser, real_masks, run, take_turns
from segmentation.data.voc import VOID
from segmentation.training.losses import lovasz_softmax

CLASSES = 21


def main() -> None:
    made = parser("loss", __doc__)
    made.add_argument("--rounds", type=int, default=7, help="turns of each side (default: %(default)s)")
    made.add_argument("--sizes", type=int, nargs="+", default=[259, 518], help="sides of the masks (default: 259 518)")
    run(made, measure)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    smp, rows = LovaszLoss("multiclass", ignore_index=VOID), []
    print(f"{'logits':44}{'smp':>12}{'ours':>12}{'ratio':>9}{'kornia ratio':>14}{'value':>10}{'1 − cosine':>12}")
    for size in arguments.sizes:
        mask = real_masks(arguments.voc, 2, size)
        filled = torch.where(mask == VOID, 0, mask).long()
        for name, logits in cases(mask).items():
            sides = {
                "smp": lambda logits=logits, mask=mask: step(smp, logits, mask),
                "kornia": lambda logits=logits, mask=filled: step(lovasz_softmax_loss, logits, mask),
                "ours": lambda logits=logits, mask=mask: step(lovasz_softmax, logits, mask),
            }
            for side in sides.values():
                side()
            seconds = take_turns(sides, arguments.rounds)
            row: dict[str, Any] = {"case": f"{name}, {size}", **compare(seconds["smp"], seconds["ours"])}
            row["kornia"] = compare(seconds["kornia"], seconds["ours"])
            (value, gradient), (expected, wanted) = step(lovasz_softmax, logits, mask), step(smp, logits, mask)
            row["value_error"] = abs(value / expected - 1)
            row["gradient_cosine"] = F.cosine_similarity(gradient.double(), wanted.double(), dim=0).item()
            rows.append(row)
            print(
                f"{row['case']:44}{row['plain_s']:10.3f} s{row['ours_s']:10.3f} s{row['ratio']:8.2f}×"
                f"{row['kornia']['ratio']:13.2f}×{row['value_error']:10.1e}{1 - row['gradient_cosine']:12.1e}",
                flush=True,
            )
    return {"ratio": min(row["ratio"] for row in rows), "rows": rows}


def cases(mask: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = mask.shape[-1]
    noise = torch.randn(len(mask), CLASSES, size, size, generator=generator)
    coarse = torch.randn(len(mask), CLASSES, size // 14, size // 14, generator=generator)
    truth = F.one_hot(mask.long() % VOID, CLASSES).movedim(-1, 1).float().contiguous()
    return {
        "random": 2 * noise,
        "smooth": F.interpolate(coarse, size=(size, size), mode="bilinear"),
        "nearly right": 4 * truth + noise,
    }


def step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, mask: Tensor) -> tuple[float, Tensor]:
    """Value and gradient."""
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, mask)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient.flatten()


if __name__ == "__main__":
    main()
