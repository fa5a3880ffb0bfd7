"""How a figure's points name their neurons."""

from __future__ import annotations

from typing import Any

import numpy as np

from tl_flash.neuron_map import NeuronMap


def named(neurons: NeuronMap, row: np.ndarray, column: np.ndarray) -> tuple[str, dict[str, Any]]:
    """The hover template of the names at places of a map's tensors, and what a trace needs for it.

    A dense neuron's name is put together from customdata, whose first two columns are its layer and index; one of a
    mixture of experts comes as text.
    """
    if neurons.n_experts is None:
        return "<b>L%{customdata[0]}N%{customdata[1]}</b>", {}
    names = [str(neurons.neuron(int(r), int(c))) for r, c in zip(row, column, strict=True)]
    return "<b>%{hovertext}</b>", {"hovertext": names}
