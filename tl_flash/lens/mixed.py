"""The exact mean over few texts and the mean-field lens of many, each weighted by how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.clamps import Prompts
from tl_flash.lens.estimate import Estimate
from tl_flash.lens.exact import exact
from tl_flash.lens.mean_field import mean_field
from tl_flash.lens.targets import vocabulary_covariance
from tl_flash.weights import MLPWeights

_RIDGE = 1e-6


def mixed(
    model: Any,
    weights: MLPWeights,
    texts: Prompts,
    layers: Sequence[int],
    *,
    exact_prompts: int,
    freeze_attention: bool = True,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Estimate:
    """The mean-field lens of all texts and the exact mean of some, mixed."""
    some = spread(texts, exact_prompts)
    parts = [Prompts(part) for part in (some[::2], some[1::2])]
    halves = [
        exact(model, part, layers, freeze_attention=freeze_attention, batch_size=batch_size, progress=progress)
        for part in parts
    ]
    fields = [mean_field(model, part, layers, progress=progress) for part in (texts, *parts)]
    return mix(weights, layers, fields[0], halves, fields[1:])


def mix(
    weights: MLPWeights, layers: Sequence[int], field: Estimate, halves: Sequence[Estimate], fields: Sequence[Estimate]
) -> Estimate:
    """The weighted sum that is nearest, layer by layer, to the exact mean over all texts like these.

    How the few texts of the exact mean differ from all texts shows in their mean-field lenses too, so it is taken off
    by that first: the mean-field lens as a control variate. Then the two lenses are weighted.

    Args:
        weights: of the model.
        layers: of the estimates.
        field: the mean-field lens of all texts.
        halves: the exact means of as many texts each, none in both.
        fields: the mean-field lenses of the same texts as `halves`.
    """
    J, stderr = torch.empty_like(field.J), torch.empty_like(field.J)
    output = vocabulary_covariance(weights)
    for i, layer in enumerate(layers):
        metric = Metric(output, _write_metric(weights, layer))
        slope = metric.slope(halves[0].J[i] - halves[1].J[i], fields[0].J[i] - fields[1].J[i])
        a, b = (half.J[i] - slope * (own.J[i] - field.J[i]) for half, own in zip(halves, fields, strict=True))
        of_field, of_exact = metric.weights(field.J[i], a, b)
        J[i] = of_field * field.J[i] + of_exact * (a + b) / 2
        stderr[i] = ((of_field * field.stderr[i]).square() + (of_exact * (a - b) / 2).square()).sqrt()
    return field._replace(J=J, stderr=stderr)


class Metric(NamedTuple):
    """How near two Jacobians A and B of a layer are, by what they make of its neurons.

    It is the sum over write directions w of the covariance over the vocabulary of A w @ W_U' and B w @ W_U'.
    """

    output: Float[Tensor, "d_model d_model"]
    """The covariance of W_U'."""
    input: Float[Tensor, "d_model d_model"]
    """The sum of w w' over the layer's write directions, each of length 1."""

    def product(self, A: Float[Tensor, "d_model d_model"], B: Float[Tensor, "d_model d_model"]) -> float:
        """The sum over neurons."""
        return float(((self.output @ A.double() @ self.input) * B.double()).sum())

    def slope(self, noise: Tensor, shown: Tensor) -> float:
        """How much of `noise` there is for each of `shown`, by least squares."""
        return self.product(noise, shown) / max(self.product(shown, shown), torch.finfo(torch.float64).tiny)

    def weights(self, field: Tensor, a: Tensor, b: Tensor) -> tuple[float, float]:
        """Of the mean-field lens and of the mean of two independent exact ones: by least squares.

        The truth is not known, but its product with `field` is that of the exact mean on average, and its product with
        the exact mean is that of its two halves, whose errors are independent. Where the two lenses are the same, as
        after the last layer, a trace of ridge shares the weight between them.
        """
        X = (a + b) / 2
        cross, own = self.product(field, X), self.product(a, b)
        gram = torch.tensor([[self.product(field, field), cross], [cross, self.product(X, X)]], dtype=torch.float64)
        gram += _RIDGE * gram.trace() * torch.eye(2)
        of_field, of_exact = torch.linalg.solve(gram, torch.tensor([cross, own], dtype=torch.float64)).tolist()
        return of_field, of_exact


def spread(texts: Prompts, n: int) -> tuple[Tensor, ...]:
    """That many of the texts, at even distances."""
    if isinstance(n, bool) or not isinstance(n, int) or not 2 <= n <= len(texts.rows):
        raise ValueError(
            f"exact_prompts: expected 2 to {len(texts.rows)}, as many as there are prompts, got {n!r}; "
            "two halves of them tell how far the exact mean can be trusted"
        )
    return tuple(texts.rows[i * len(texts.rows) // n] for i in range(n))


def _write_metric(weights: MLPWeights, layer: int) -> Float[Tensor, "d_model d_model"]:
    writes = weights.directions(layer, "out").double().cpu()
    writes = writes / writes.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return writes.T @ writes
