"""What the tours write: tables, figures, and maps with their tables."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tl_flash import NeuronMap

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Text in quotes: a token may be a line break."""
    frame.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)


def write_figure(figure: go.Figure, path: Path) -> None:
    """As HTML; plotly's script lies beside it."""
    figure.write_html(path.with_suffix(".html"), include_plotlyjs="directory")


def write_maps(maps: Mapping[str, NeuronMap], out: Path, say: Callable[[str], None]) -> None:
    """Maps by the names of their files, each with a table beside it, and a line that says what it is."""
    for name, neurons in maps.items():
        neurons.save(out / f"{name}.safetensors")
        write_table(neurons.to_frame().drop(columns="tokens"), out / f"{name}.csv")
        say(f"{neurons!r}")
