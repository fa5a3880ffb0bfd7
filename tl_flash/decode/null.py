"""The null: directions that shuffle each coordinate over a layer's neurons, and which of them are decoded.

A bar at the null's 99.9% takes many draws, of which it uses the greatest few. So each draw is first scored on the part
of the vocabulary where most great top z-scores are: on the tokens whose scores are spread most, and on those that are
extreme in one coordinate, which a draw of one large coordinate reads. The draws that come out greatest are decoded, and
of the others a sample, each of which stands for several. Whatever the first scores miss, the share of draws beyond any
bar is estimated without bias, and at the 99.9% with the error that all draws have. Root mean square errors there,
against 8,192 draws of W_in (Gemma 4,096), and in brackets those of 1,024 draws all decoded (`python -m
benchmarks.null_bar`): SmolLM2-135M layers 0, 15 and 29 0.15 (0.15), 0.25 (0.25) and 0.24 (0.24) of 7.3, 7.0 and 7.3;
Gemma 3 270M layers 0, 9 and 17 0.29 (0.29), 0.52 (0.52) and 0.38 (0.38) of 6.4, 8.1 and 8.6. The median and the 90%
are coarser: off by up to 0.06 (0.02) and 0.13 (0.03).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from tl_flash.kernel import Readout, Unembedding, extreme_tokens, greatest_z, widest_tokens

NULL_DRAWS = 1024
"""Shuffled directions a layer; both poles of each count, so the null holds twice as many values."""
_SHARE = 32
"""One token in so many is scored first, and those that are extreme in some coordinate."""
_GREATEST, _SAMPLED = 32, 62
"""Draws that are decoded: those of greatest z on these tokens, and of the rest; the latter stand for all of it."""


def shuffled_rows(n: int, d_model: int, *, seed: int, draws: int = NULL_DRAWS) -> Int32[Tensor, "draw d_model"]:
    """Of which of n directions a null direction takes each of its coordinates: no row's structure is left."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n, (draws, d_model), generator=generator, dtype=torch.int32)


def to_decode(draws: Float[Tensor, "draw d_model"], unembedding: Unembedding) -> Float[Tensor, "some d_model"]:
    """The draws that the null is made of: all where the score is the cosine, whose tokens are all spread alike."""
    if unembedding.score != "dot":
        return draws
    widest = widest_tokens(draws, max(unembedding.d_vocab // _SHARE, 1), unembedding)
    scored = torch.cat([widest, extreme_tokens(unembedding)]).unique()
    by_z = greatest_z(draws, scored, unembedding).argsort(descending=True, stable=True)
    rest = by_z[_GREATEST:].sort().values[:_SAMPLED]  # draws are alike but for their z, so the first are a sample
    return draws[torch.cat([by_z[:_GREATEST], rest]).to(draws.device)]


def null_of(decoded: Readout) -> dict[str, Float[Tensor, " value"]]:
    """Top z-scores and kurtosis of null directions, sorted upwards, of what `to_decode` gave, decoded."""
    z, kurtosis = decoded.logits[..., 0] / decoded.std, decoded.kurtosis
    if len(kurtosis) < NULL_DRAWS:
        times = (NULL_DRAWS - _GREATEST) // _SAMPLED
        z, kurtosis = (
            torch.cat([of[..., :_GREATEST], of[..., _GREATEST:].repeat_interleave(times, -1)], -1)
            for of in (z, kurtosis)
        )
    return {"null.z": z.flatten().sort().values, "null.kurtosis": kurtosis.sort().values}
