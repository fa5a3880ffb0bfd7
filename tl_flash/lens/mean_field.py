"""The mean-field lens: the product of the blocks' own mean Jacobians, from forward passes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.clamps import Prompts
from tl_flash.lens.blocks import Block
from tl_flash.lens.estimate import Estimate
from tl_flash.lens.factors import Sums
from tl_flash.lens.norms import Norm
from tl_flash.lens.passages import Passage, passages
from tl_flash.lens.targets import final_norm, first_target
from tl_flash.progress import track

_ROWS = 16
"""Rows of a Jacobian that one backward pass gives."""
Square = Float[Tensor, "d_model d_model"]


def mean_field(
    model: Any, texts: Prompts, layers: Sequence[int], *, batch_size: int = 8, progress: bool | None = None
) -> Estimate:
    """The lens, and half the difference of those of every other text and of the rest."""
    blocks = survey(model, texts)
    parts = [part for part in (texts.rows[::2], texts.rows[1::2]) if part]
    halves = [local_jacobians(model, Prompts(part), blocks, batch_size, progress) for part in parts]
    fields = [MeanField.of_all(halves), *halves]
    J = torch.empty(len(layers), *halves[0].final.parts[0].shape)
    stderr = torch.full_like(J, torch.nan)
    for layer, products in chains(fields):
        if layer in layers:
            at = layers.index(layer)
            J[at] = products[0].float().cpu()
            if len(halves) == 2:
                stderr[at] = (products[1] - products[2]).abs().float().cpu() / 2
    measured = tuple(layer for layer, block in enumerate(blocks) if block is None)
    return Estimate(J, stderr, len(texts.rows), sum(map(len, texts.rows)), measured)


def field_of(model: Any, texts: Prompts, batch_size: int, progress: bool | None = None) -> MeanField:
    """The local mean Jacobians over texts."""
    return local_jacobians(model, texts, survey(model, texts), batch_size, progress)


@dataclass(frozen=True, eq=False)
class Local:
    """Mean Jacobians of one block: it is the product of (1 + part), the first part acting first."""

    parts: tuple[Square, ...]
    tokens: int

    @classmethod
    def of_all(cls, several: Sequence[Local]) -> Local:
        """Those over the tokens of all."""
        tokens = sum(each.tokens for each in several)
        columns = zip(*(each.parts for each in several), strict=True)
        means = [sum(part * each.tokens / tokens for part, each in zip(c, several, strict=True)) for c in columns]
        return cls(tuple(map(torch.as_tensor, means)), tokens)

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

    @classmethod
    def of_all(cls, fields: Sequence[MeanField]) -> MeanField:
        """Those over the texts of all."""
        columns = zip(*(field.blocks for field in fields), strict=True)
        return cls([Local.of_all(column) for column in columns], Local.of_all([field.final for field in fields]))


def chains(fields: Sequence[MeanField]) -> Iterator[tuple[int, list[Square]]]:
    """The lenses of each layer, from the last to the first: the final norm's Jacobian times all later blocks'."""
    products = [field.final.parts[0] for field in fields]
    for layer in reversed(range(len(fields[0].blocks))):
        yield layer, products
        products = [product @ field.blocks[layer].block() for product, field in zip(products, fields, strict=True)]


def local_jacobians(
    model: Any, texts: Prompts, blocks: Sequence[Block | None], batch_size: int, progress: bool | None
) -> MeanField:
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

    for _, tokens in track(list(texts.batches(batch_size)), "mean-field lens", progress):
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
