import json

import pytest
import torch

from tests.test_neuron_map import Words
from tl_flash import clamp_sweep, compare, decode_directions, plots


@pytest.fixture(scope="module")
def maps():
    generator = torch.Generator().manual_seed(0)
    W_U, x = torch.randn(16, 60, generator=generator), torch.randn(80, 16, generator=generator)
    noise = 0.5 * torch.randn(80, 16, generator=generator)
    return [decode_directions(d, W_U, k=3, tokens=[" w9"], tokenizer=Words()) for d in (x, x + noise)]


def data(figure):
    """What the browser gets; a figure that does not serialise does not show."""
    return json.loads(figure.to_json())


def test_a_tokens_probability_by_layer(maps):
    figure = plots.token_by_layer(maps[0], " w9")
    [points] = figure.data
    assert list(points.y) == pytest.approx(maps[0].tracked_probs(" w9").flatten().tolist())
    assert points.customdata[7][0] == "L0N7" and points.customdata[7][1] == repr(maps[0]["L0N7"].positive[0].token)
    assert "' w9'" in figure.layout.title.text and "probability" in figure.layout.yaxis.title.text
    assert data(figure)
    with pytest.raises(KeyError, match="not tracked"):
        plots.token_by_layer(maps[0], " w8")


def test_a_dose_curve(bridge):
    curve = clamp_sweep(bridge, "L1N3", [8.0, 0.0], ["a dog", "the red house"], [" dog", 5])
    figure = plots.dose_curve(curve)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [line.name for line in lines] == ["' dog'", repr(curve.tokens[1])]
    assert list(lines[0].x) == [0.0, 8.0]
    assert list(lines[0].y) == pytest.approx(curve.prob[[1, 0], :, 0].mean(1).tolist())
    assert len(figure.layout.shapes) == 2, "the unclamped probability of each token"
    assert data(figure)


def test_agreement_by_layer(maps):
    comparison = compare(*maps)
    figure = plots.agreement(comparison)
    own, null = figure.data
    assert list(own.y) == pytest.approx(comparison.by_layer.tolist())
    assert list(null.y) == pytest.approx(comparison.null_by_layer.tolist())
    assert f"{comparison.agreement:.1%}" in own.name and data(figure)
