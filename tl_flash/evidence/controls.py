"""Matched controls: like neurons, and how far a neuron's effect is beyond theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_flash.clamps import Answers
from tl_flash.names import Neuron
from tl_flash.weights import MLPWeights


class Peers:
    """Controls: neurons of the same layer with about the same ||W_out||."""

    def __init__(self, weights: MLPWeights, count: int, seed: int) -> None:
        if not 2 <= count < weights.d_mlp:
            raise ValueError(f"controls: expected 2 to {weights.d_mlp - 1}, the neurons left in a layer, got {count}")
        self._weights, self._count = weights, count
        self._generator = torch.Generator().manual_seed(seed)
        self._norms: dict[int, Tensor] = {}

    def of(self, neuron: Neuron) -> list[Neuron]:
        """Draw the controls of a neuron."""
        if neuron.layer not in self._norms:
            self._norms[neuron.layer] = self._weights.directions(neuron.layer, "out").norm(dim=-1).cpu()
        norms = self._norms[neuron.layer]
        distance = (norms - norms[neuron.index]).abs()
        distance[neuron.index] = torch.inf
        nearest = distance.argsort(stable=True)[: min(3 * self._count, len(norms) - 1)]
        drawn = nearest[torch.randperm(len(nearest), generator=self._generator)[: self._count]]
        return [Neuron(neuron.layer, int(index)) for index in drawn]


def against(controls: Tensor, before: Answers, after: Answers, token: int) -> dict[str, float]:
    """How a token moved, and the chance that a control moves it as far."""
    change = (after.log_probs - before.log_probs)[:, token]
    error = float(change.std() / len(change) ** 0.5) if len(change) > 1 else 0.0
    dlogp = float(change.mean())
    return {
        "dlogp": dlogp,
        "dlogp_low": dlogp - 1.96 * error,
        "dlogp_high": dlogp + 1.96 * error,
        "control_dlogp": float(controls.mean()),
        "p_value": chance_of(dlogp, controls),
    }


def chance_of(effect: float, controls: Tensor) -> float:
    """The chance that a control has as large an effect, nats: a Student prediction interval, one-sided."""
    from scipy.stats import t as student

    others, n = controls.double(), len(controls)
    spread = max(float(others.std()), _NOISE) * (1 + 1 / n) ** 0.5
    return float(student.sf((effect - float(others.mean())) / spread, n - 1))


_NOISE = 1e-6  # nats: what rounding makes of log-probabilities in float32; less is no spread
