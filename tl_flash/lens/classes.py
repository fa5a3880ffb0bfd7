"""Which tokens of a text are alike, so that what the blocks do to them is averaged apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_flash.clamps import attached, run_to
from tl_flash.lens.passages import padded
from tl_flash.weights import measuring

_ROUNDS = 20


def second_class(model: Any, texts: Sequence[Int[Tensor, " position"]]) -> Bool[Tensor, "text position"]:
    """Which tokens of each text are of its second class: the residual streams of the two point apart half-way through.

    They are told by the sign of the first principal component over the text, then by the nearer of the two means
    (Lloyd's algorithm). A text's classes do not depend on what other texts there are; its first token and padding are
    of none, and are False.
    """
    layer = len(model.blocks) // 2
    seen: list[Tensor] = []

    def keep(residual: Tensor, hook: Any) -> None:
        residual = residual.detach().cpu().double()
        seen.append(residual - residual.mean(-1, keepdim=True))  # which processed weights may have taken off

    with measuring(model), attached(model, [(f"blocks.{layer}.hook_resid_pre", keep)]):
        run_to(model, padded(texts), layer)
    second = torch.zeros(seen[0].shape[:2], dtype=torch.bool)
    for text, residual, of_text in zip(texts, seen[0], second, strict=True):
        of_text[1 : len(text)] = _apart(torch.nn.functional.normalize(residual[1 : len(text)], dim=1))
    return second


def _apart(points: Float[Tensor, "token d_model"]) -> Bool[Tensor, " token"]:
    """Which points are of the second class."""
    centred = points - points.mean(0)
    second = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0] > 0
    for _ in range(_ROUNDS):
        if second.all() or not second.any():
            break
        nearer = torch.cdist(points, torch.stack([points[~second].mean(0), points[second].mean(0)])).argmin(1).bool()
        if torch.equal(nearer, second):
            break
        second = nearer
    return second
