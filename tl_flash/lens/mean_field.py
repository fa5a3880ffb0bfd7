"""The mean-field lens: the product of the blocks' own mean Jacobians over each text, from forward passes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.clamps import Prompts
from tl_flash.lens.blocks import Block
from tl_flash.lens.estimate import Estimate, OverTexts
from tl_flash.lens.factors import Sums
from tl_flash.lens.norms import Norm
from tl_flash.lens.passages import Passage, passages
from tl_flash.lens.targets import final_norm, first_target
from tl_flash.progress import track

_ROWS = 16
"""Rows of a Jacobian that one backward pass gives."""
Square = Float[Tensor, "d_model d_model"]


def mean_field(model: Any, texts: Prompts, layers: Sequence[int], *, progress: bool | None = None) -> Estimate:
    """The mean over texts of the lens of each, and its standard error from their spread; one text is held at a time."""
    blocks = survey(model, texts)
    d_model = model.W_U.shape[0]
    sums = OverTexts(len(layers), d_model)
    for row in track(texts.rows, "mean-field lens", progress):
        made = dict(chain(local_jacobians(model, Prompts((row,)), blocks, 1)))
        sums.add(slice(0, d_model), torch.stack([made[layer] for layer in layers])[:, :, None])
    measured = tuple(layer for layer, block in enumerate(blocks) if block is None)
    tokens = sum(map(len, texts.rows))
    return Estimate(sums.mean().float(), sums.stderr().float(), len(texts.rows), tokens, measured)


def field_of(model: Any, texts: Prompts, batch_size: int) -> MeanField:
    """The local mean Jacobians over all texts together."""
    return local_jacobians(model, texts, survey(model, texts), batch_size)


@dataclass(frozen=True, eq=False)
class Local:
    """Mean Jacobians of one block: it is the product of (1 + part), the first part acting first."""

    parts: tuple[Square, ...]
    tokens: int

    def block(self) -> Square:
        """The mean Jacobian of the residual stream after the block by that before it."""
        product = eye = torch.eye(len(self.parts[0]), dtype=self.parts[0].dtype, device=self.parts[0].device)
        for part in self.parts:
            product = (eye + part) @ product
        return product


class MeanField(NamedTuple):
    """The local mean Jacobians of a model over some texts."""

    blocks: list[Local]
    final: Local
    """Of the final norm, without its gain."""


def chain(field: MeanField) -> Iterator[tuple[int, Square]]:
    """The lens of each layer, from the last to the first: the final norm's Jacobian times all later blocks'."""
    product = field.final.parts[0]
    for layer in reversed(range(len(field.blocks))):
        yield layer, product
        for part in reversed(field.blocks[layer].parts):
            product = product + product @ part


def local_jacobians(model: Any, texts: Prompts, blocks: Sequence[Block | None], batch_size: int) -> MeanField:
    """The mean over tokens of each block's and the final norm's Jacobians, holding one batch of one layer at a time."""
    numeric = frozenset(layer for layer, block in enumerate(blocks) if block is None)
    norm = final_norm(model)
    sums: dict[int, tuple[Tensor, ...]] = {}
    counts: dict[int, int] = {}

    def add(layer: int, tokens: int, *parts: Tensor) -> None:
        before = sums.get(layer)
        sums[layer] = parts if before is None else tuple(old + new for old, new in zip(before, parts, strict=True))
        counts[layer] = counts.get(layer, 0) + tokens

    def take(layer: int, passage: Passage) -> None:
        block, left = blocks[layer], passage.left
        assert left is not None
        n_texts, length, _ = left.shape
        n_targets = n_texts * (length - 1)
        if block is None:
            add(layer, n_targets, _measured(passage))
        else:
            attention, mlp = block.sums(passage, 1)
            add(layer, n_targets, *attention, *mlp)
        if layer == len(blocks) - 1:
            outputs = left.detach()[:, first_target(length) :].flatten(0, 1)
            add(len(blocks), len(outputs), _of_norm(norm, outputs))

    def parts(layer: int, block: Block | None) -> tuple[Square, ...]:
        if block is None:
            return sums[layer]
        inner, outer, *mlp = sums[layer]
        jacobians = block.jacobians(Sums(inner, outer), Sums(*mlp))
        return (jacobians[0] + jacobians[1],) if block.parallel else jacobians

    for _, tokens in texts.batches(batch_size):
        passages(model, tokens, take, moved=numeric)
    means = [
        Local(tuple(part / counts[layer] for part in parts(layer, block)), counts[layer])
        for layer, block in enumerate((*blocks, None))
    ]
    return MeanField(means[:-1], means[-1])


def survey(model: Any, texts: Prompts) -> list[Block | None]:
    """What each block is made of, told by the longest text; None where no closed form holds for it."""
    blocks: dict[int, Block | None] = {}

    def take(layer: int, passage: Passage) -> None:
        blocks[layer] = Block.of(model.blocks[layer], passage)

    passages(model, max(texts.rows, key=len)[None], take)
    return [blocks[layer] for layer in sorted(blocks)]


def _measured(passage: Passage) -> Square:
    """The sum over targets of what a block adds, by one change of every position but the first: row by row."""
    assert passage.delta is not None and passage.left is not None
    total = passage.left[:, 1:].sum((0, 1))
    d_model, n_targets = len(total), passage.left[:, 1:, 0].numel()
    eye = torch.eye(d_model, dtype=total.dtype, device=total.device)
    rows = [
        torch.autograd.grad(total, passage.delta, seeds, retain_graph=True, is_grads_batched=True)[0]
        for seeds in eye.split(_ROWS)
    ]
    return torch.cat(rows).to(torch.promote_types(total.dtype, torch.float32)) - n_targets * eye


def _of_norm(norm: Norm | None, outputs: Float[Tensor, "token d_model"]) -> Square:
    """The sum over tokens of the final norm's Jacobian, without its gain; of no norm, the identity's."""
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    eye = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    if norm is None:
        return len(outputs) * eye
    n, r = norm.unit(outputs)
    total = r.sum() * eye - (n * r[:, None]).T @ n / len(eye)
    return total - total.mean(1, keepdim=True) if norm.centre else total
