"""Tables of results that several runs fill, and what a run is asked for."""

import argparse

import pandas as pd
import pytest

from benchmarks.measure import asked_names
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


def test_what_is_not_known_is_refused_before_anything_is_measured(capsys):
    parser, known = argparse.ArgumentParser(), ("find, in", "find, out")
    assert asked_names(parser, "--ways", "find, out;find, in", known) == ["find, out", "find, in"]
    for given, told in (("find, lens", "'find, lens'"), ("", "''"), ("find, in,find, out", "'find, in,find, out'")):
        with pytest.raises(SystemExit):
            asked_names(parser, "--ways", given, known)
        assert f"--ways: expected some of find, in; find, out, got {told}" in capsys.readouterr().err
