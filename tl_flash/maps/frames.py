"""A map as a pandas frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tl_flash.maps.readings import POLES, Readings

if TYPE_CHECKING:
    import pandas as pd


def to_frame(readings: Readings) -> pd.DataFrame:
    """A row a neuron and pole; see `NeuronMap.to_frame`."""
    import pandas as pd

    L, M, E = len(readings.layers), readings.d_mlp, readings.n_experts or 1
    frames = []
    for pole in POLES:
        top = readings.pole(pole)
        strings = top.strings.reshape(L * M, readings.k)
        columns = {
            "neuron": [str(readings.neuron(row, column)) for row in range(L) for column in range(M)],
            "layer": np.repeat(readings.layers, M),
            **({} if readings.n_experts is None else {"expert": np.tile(np.repeat(np.arange(E), M // E), L)}),
            "index": np.tile(np.arange(M // E), L * E),
            "pole": pole,
            "token": strings[:, 0],
            "tokens": list(map(tuple, strings)),
            "token_id": top.ids[..., 0],
            "logit": top.logits[..., 0],
            "prob": top.probs[..., 0]
            if readings.score == "dot"
            else torch.full((L, M), torch.nan, dtype=torch.float32),
            "z": top.z[..., 0],
            "write_z": top.write_z[..., 0],
            "log_z": top.log_z,
            "norm": readings.norm,
            "mean": readings.mean,
            "std": readings.std,
            "kurtosis": readings.kurtosis,
        }
        frames.append(pd.DataFrame({k: v.flatten().numpy() if torch.is_tensor(v) else v for k, v in columns.items()}))
    order = ["layer", *(["expert"] if readings.n_experts else []), "index"]
    return pd.concat(frames, ignore_index=True).sort_values(order, kind="stable", ignore_index=True)
