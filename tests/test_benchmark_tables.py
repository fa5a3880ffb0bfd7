"""Tables of results that several runs fill."""

import pandas as pd

from benchmarks.tables import kept


def test_a_later_run_replaces_its_own_rows_and_keeps_the_others_in_their_places(tmp_path):
    path = tmp_path / "results" / "table.csv"
    first = pd.DataFrame({"share": [0.12345, 0.2, 0.3], "way": ["in", "out", "lens"], "n": [1, 1, 1]})
    assert kept(path, first, ["way", "n"]).columns.tolist() == ["way", "n", "share"]
    table = kept(path, pd.DataFrame({"way": ["out", "out"], "n": [1, 2], "share": [0.7, 0.8]}), ["way", "n"])
    assert table.to_dict("list") == {
        "way": ["in", "out", "lens", "out"],
        "n": [1, 1, 1, 2],
        "share": [0.123, 0.7, 0.3, 0.8],
    }
    assert pd.read_csv(path).equals(table)
