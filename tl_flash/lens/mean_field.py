"""The mean-field lens: the product of the blocks' own mean Jacobians over alike tokens, from forward passes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_flash.clamps import Prompts
from tl_flash.lens.blocks import Block
from tl_flash.lens.classes import second_class
from tl_flash.lens.estimate import Estimate, OverTexts
from tl_flash.lens.norms import Norm
from tl_flash.lens.passages import Passage, passages
from tl_flash.lens.targets import final_norm, first_target
from tl_flash.progress import track

_ROWS = 16
"""Rows of a Jacobian that one backward pass gives."""
_BYTES = 2**30
"""What the Jacobians of the texts that are run together may take."""
_TOKENS = 2**9
"""Tokens, padding included, that are run together at most; a longer text is run alone."""
Square = Float[Tensor, "*of d_model d_model"]


def mean_field(model: Any, texts: Prompts, layers: Sequence[int], *, progress: bool | None = None) -> Estimate:
    """The mean over texts of the lens of each, and its standard error from their spread; few are held at a time."""
    blocks = survey(model, texts)
    apart = all(block is not None for block in blocks)
    d_model, n_classes = model.W_U.shape[0], 1 + apart
    sums = OverTexts(len(layers), d_model)
    places = {layer: place for place, layer in enumerate(layers)}
    a_text = 4 * len(blocks) * (n_classes + n_classes**2) * d_model**2
    for batch in track(list(_together(texts.rows, _BYTES // a_text)), "mean-field lens", progress):
        second = second_class(model, batch) if apart else None
        for layer, lenses in chain(local_jacobians(model, batch, blocks, second)):
            if layer in places:
                sums.add(slice(places[layer], places[layer] + 1), slice(0, d_model), lenses[:, None])
        sums.texts += len(batch)
    measured = tuple(layer for layer, block in enumerate(blocks) if block is None)
    tokens = sum(map(len, texts.rows))
    return Estimate(sums.mean().float(), sums.stderr().float(), len(texts.rows), tokens, measured)


def _together(rows: Sequence[Int[Tensor, " position"]], at_most: int) -> Iterator[list[Int[Tensor, " position"]]]:
    """Texts of about the same length, as many as may be run together."""
    batch: list[Tensor] = []
    for row in sorted(rows, key=len):
        if batch and (len(batch) >= at_most or (len(batch) + 1) * len(row) > _TOKENS):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def field_of(model: Any, texts: Prompts, batch_size: int) -> MeanField:
    """The local mean Jacobians over all texts together."""
    blocks = survey(model, texts)
    rows = texts.rows
    fields = [local_jacobians(model, rows[at : at + batch_size], blocks) for at in range(0, len(rows), batch_size)]
    return MeanField(
        [Local.together([field.blocks[layer] for field in fields]) for layer in range(len(blocks))],
        Local.together([field.final for field in fields]),
    )


@dataclass(frozen=True, eq=False)
class Local:
    """Mean Jacobians of one block, of each text or of all: it is the product of (1 + part), the first acting first.

    A part is by classes of tokens, [text, class, d_model, d_model], or by pairs of these where a change of some tokens
    moves others, [text, to, from, d_model, d_model].
    """

    parts: tuple[Square, ...]
    tokens: Int[Tensor, "*text"]
    """How many tokens they are means over."""

    @classmethod
    def together(cls, several: Sequence[Local]) -> Local:
        """The means over all tokens of several batches of texts."""
        tokens = torch.cat([each.tokens for each in several])
        weights = tokens / tokens.sum()
        parts = zip(*(each.parts for each in several), strict=True)
        return cls(tuple(torch.tensordot(weights, torch.cat(part), 1) for part in parts), tokens.sum())

    def block(self) -> Square:
        """The mean Jacobian of the residual stream after the block by that before it, where there is one class."""
        d_model = self.parts[0].shape[-1]
        product = eye = torch.eye(d_model, dtype=self.parts[0].dtype, device=self.parts[0].device)
        for part in self.parts:
            product = (eye + part.view(d_model, d_model)) @ product
        return product


class MeanField(NamedTuple):
    """The local mean Jacobians of a model over some texts."""

    blocks: list[Local]
    final: Local
    """Of the final norm, without its gain."""


def chain(field: MeanField) -> Iterator[tuple[int, Square]]:
    """The lens of each layer, from the last to the first: the final norm's Jacobian times all later blocks'.

    The output's Jacobian is by a change of each class of tokens; a lens is by one change of them all.
    """
    product = field.final.parts[0]
    for layer in reversed(range(len(field.blocks))):
        yield layer, product.sum(1)
        for part in reversed(field.blocks[layer].parts):
            product = product + (product @ part if part.ndim == 4 else _by_pairs(product, part))


def _by_pairs(product: Tensor, part: Tensor) -> Float[Tensor, "text from d_model d_model"]:
    of_each = [
        reduce(torch.add, [before @ part[:, to, source] for to, before in enumerate(product.unbind(1))])
        for source in range(part.shape[2])
    ]
    return torch.stack(of_each, dim=1)


def local_jacobians(
    model: Any,
    texts: Sequence[Int[Tensor, " position"]],
    blocks: Sequence[Block | None],
    second: Bool[Tensor, "text position"] | None = None,
) -> MeanField:
    """The means over the tokens of each text of each block's and the final norm's Jacobians.

    Those of the second class are averaged apart; where it is None there is one class.
    """
    numeric = frozenset(layer for layer, block in enumerate(blocks) if block is None)
    norm = final_norm(model)
    found: dict[int, Local] = {}

    def take(layer: int, passage: Passage) -> None:
        block, left = blocks[layer], passage.left
        assert left is not None
        counted = passage.counted([1] * len(passage.lengths))
        members, tokens = _by_class(counted, second), counted.sum(1)
        if block is None:
            parts = ((_measured(passage) / tokens[:, None, None])[:, None],)
        else:
            attention, mlp = block.jacobians(passage, members)
            parts = (attention, mlp)
            if block.parallel:
                attention.diagonal(dim1=1, dim2=2).add_(mlp.permute(0, 2, 3, 1))
                parts = (attention,)
        found[layer] = Local(parts, tokens.long())
        if layer == len(blocks) - 1:
            found[len(blocks)] = _of_norm(norm, passage, members)

    passages(model, texts, take, moved=numeric)
    *of_blocks, final = (found[layer] for layer in range(len(blocks) + 1))
    return MeanField(of_blocks, final)


def _by_class(
    counted: Float[Tensor, "text position"], second: Bool[Tensor, "text position"] | None
) -> Float[Tensor, "text class position"]:
    """1 at the counted positions of each class."""
    if second is None:
        return counted[:, None]
    second = second.to(counted.device)
    return torch.stack([counted * ~second, counted * second], dim=1)


def survey(model: Any, texts: Prompts) -> list[Block | None]:
    """What each block is made of, told by the longest text; None where no closed form holds for it."""
    blocks: dict[int, Block | None] = {}

    def take(layer: int, passage: Passage) -> None:
        blocks[layer] = Block.of(model.blocks[layer], passage)

    passages(model, (max(texts.rows, key=len),), take)
    return [blocks[layer] for layer in sorted(blocks)]


def _measured(passage: Passage) -> Square:
    """The sum over a text's targets of what a block adds, by one change of every position but the first, by rows."""
    assert passage.delta is not None and passage.left is not None
    counted = passage.counted([1] * len(passage.lengths))
    total = (passage.left * counted[..., None].to(passage.left)).sum((0, 1))
    eye = torch.eye(len(total), dtype=total.dtype, device=total.device)
    rows = [
        torch.autograd.grad(total, passage.delta, seeds, retain_graph=True, is_grads_batched=True)[0][:, :, 0]
        for seeds in eye.split(_ROWS)
    ]
    left = torch.cat(rows).transpose(0, 1).to(torch.promote_types(total.dtype, torch.float32))
    return left - counted.sum(1)[:, None, None] * eye


def _of_norm(norm: Norm | None, passage: Passage, members: Float[Tensor, "text class position"]) -> Local:
    """The final norm's Jacobian without its gain (of no norm, the identity), over each text's outputs by class.

    Summed over the classes it is the mean over the outputs.
    """
    assert passage.left is not None
    counted = passage.counted([first_target(length) for length in passage.lengths])
    outputs, tokens = passage.left.detach().to(counted), counted.sum(1)
    eye = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
    share = members * (counted / tokens[:, None])[:, None]
    if norm is None:
        return Local((share.sum(-1)[..., None, None] * eye,), tokens.long())
    n, r = norm.unit(outputs)
    share = share * r[:, None]
    total = share.sum(-1)[..., None, None] * eye - (n[:, None] * share[..., None]).mT @ n[:, None] / len(eye)
    return Local((total - total.mean(-1, keepdim=True) if norm.centre else total,), tokens.long())
