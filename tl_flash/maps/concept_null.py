"""How surprising a neuron's mean z over some tokens is: beside shuffled neurons, and beside other tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ConceptNull:
    """What the mean z over each concept's tokens would be by chance, in two senses of chance.

    *Shuffled neurons*: directions that take each coordinate from another neuron of the layer; the tokens stay, with
    all that they have in common. *Matched tokens*: the neuron stays, and each token gives way to a random one whose
    column of W_U' is about as long, and is taken for as long. The moments of both are kept. A tail is that of
    Pearson's symmetric curve of the null's variance and kurtosis (Pearson 1916: Student's t above the normal's
    kurtosis, a beta below), and never less than the normal's beyond its shoulders.
    """

    location: Float[Tensor, "concept reading layer"]
    """Of shuffled neurons' mean z, and so is the scale."""
    scale: Float[Tensor, "concept reading layer"]
    kurtosis: Float[Tensor, "concept reading"]
    """Excess, of shuffled neurons of all layers, each layer's in its own location and scale."""
    bin_mean: Float[Tensor, "reading neuron bin"]
    """Of each neuron's z per length of the token's column, over tokens of about one length; so is the variance."""
    bin_variance: Float[Tensor, "reading neuron bin"]
    token_kurtosis: Float[Tensor, "reading neuron"]
    """Excess, of the same over those tokens of all lengths."""
    weights: tuple[Float[Tensor, " token"], ...]
    """By concept, of its tokens; they sum to 1."""
    lengths: tuple[Float[Tensor, " token"], ...]
    """By concept, of its tokens' columns."""
    bins: tuple[Int64[Tensor, " token"], ...]
    """By concept, the lengths that its tokens are matched in."""

    def p_values(
        self, z: Float[Tensor, "reading neuron"], concept: int, layer: Int64[Tensor, " neuron"]
    ) -> Float64[np.ndarray, "null reading neuron"]:
        """Two-sided, against shuffled neurons and against matched tokens.

        Args:
            z: each neuron's mean z over the concept's tokens; NaN stays NaN.
            concept: its number.
            layer: each neuron's layer, by number.
        """
        shuffled = (z - self.location[concept][:, layer]) / self.scale[concept][:, layer]
        w, at = self.weights[concept] * self.lengths[concept], self.bins[concept]
        variances = w.square() * self.bin_variance[..., at]  # [reading, neuron, token]
        variance = variances.sum(-1)
        matched = (z - (w * self.bin_mean[..., at]).sum(-1)) / variance.sqrt()
        shared = variances.square().sum(-1) / variance.square()  # of a mean of alike tokens: 1 / their number
        return np.stack(
            [two_sided(shuffled, self.kurtosis[concept][:, None]), two_sided(matched, shared * self.token_kurtosis)]
        )


def two_sided(u: Float[Tensor, "*shape"], kurtosis: Float[Tensor, "*#shape"]) -> Float64[np.ndarray, "*shape"]:
    """Chance of a standardised value at least as far from 0, by Pearson's symmetric curve of this excess kurtosis."""
    from scipy.special import betainc, ndtr, stdtr

    far, excess = np.broadcast_arrays(u.abs().double().numpy(), kurtosis.double().numpy())
    df = 4 + 6 / np.clip(excess, _NORMAL, None)
    heavy = 2 * stdtr(df, -far * np.sqrt(df / (df - 2)))
    power = 3 / np.clip(-excess, _NORMAL, 1.2) - 2.5
    light = betainc(power + 1, 0.5, np.clip(1 - far**2 / (2 * power + 3), 0, 1))
    return np.where(excess < -_NORMAL, np.maximum(light, 2 * ndtr(-far)), heavy)


_NORMAL = 1e-4  # of an excess kurtosis that makes no difference


def moments_by_bin(
    z: Float[Tensor, "neuron token"], share: Float[Tensor, "token bin"]
) -> tuple[Float[Tensor, "neuron bin"], Float[Tensor, "neuron bin"], Float[Tensor, " neuron"]]:
    """Mean and variance of each neuron's z over each bin of tokens, and the excess kurtosis over all of them.

    Args:
        z: of tokens drawn at random.
        share: 1 / their number for the tokens of a bin, 0 for all others.
    """
    count, n_tokens = (share > 0).sum(0), z.shape[1]
    means = z @ share
    work = (z - means @ (share > 0).to(z).T).square_()
    variances = work @ share * count / (count - 1)
    squares = torch.square(z, out=work)
    first, second = z.mean(1), squares.mean(1)
    fourth = torch.linalg.vector_norm(squares, dim=1).square() / n_tokens
    third = squares.mul_(z).mean(1)
    variance = second - first.square()
    central = fourth - first * (4 * third - first * (6 * second - 3 * first.square()))
    return means, variances, central / variance.square() - 3
