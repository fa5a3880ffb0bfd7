"""Tables of results that several runs fill, a part of the rows each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd


def kept(path: Path, rows: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """Write rows into a CSV file that may have some, in place of those of the same key; the whole table as written."""
    if path.exists():
        rows = pd.concat([pd.read_csv(path), rows], ignore_index=True)
        place = rows.groupby(list(key), sort=False).ngroup()
        rows = rows.loc[place.drop_duplicates(keep="last").sort_values(kind="stable").index]
    path.parent.mkdir(exist_ok=True)
    rows[[*key, *(name for name in rows if name not in key)]].to_csv(path, index=False, float_format="%.3f")
    return pd.read_csv(path)
