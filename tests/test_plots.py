import dataclasses
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from tests import families
from tests.test_neuron_map import Words
from tl_flash import clamp_sweep, compare, concepts, decode_directions, explain, flash_decode, plots, validate
from tl_flash.show.plots import theme
from tl_flash.weights import read

D, V, N = 16, 60, 80


@pytest.fixture(scope="module")
def W_U():
    return torch.randn(D, V, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def x(W_U):
    directions = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    directions[7] = 3 * W_U[:, 9]
    directions[8] = -W_U[:, 7]  # the hostile token, at the negative pole
    return directions


@pytest.fixture(scope="module")
def maps(W_U, x):
    noise = 0.5 * torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    return [decode_directions(d, W_U, k=3, tokens=[" w9"], tokenizer=Words()) for d in (x, x + noise)]


@pytest.fixture(scope="module")
def two_layers(bridge):
    return flash_decode(bridge, side="out", tokens=[5])


@pytest.fixture(scope="module")
def validation(bridge, two_layers):
    return validate(bridge, two_layers.specialised(4, quantile=0.5), controls=3)


def values(column):
    return np.asarray(column, dtype=float).tolist()


def named(figure):
    return {trace.name: trace for trace in figure.data if trace.showlegend is not False}


def probability_in_place_of_the_top(bridge, map):
    """Each neuron of layer 0: its top token moved to the null's z-score, then the softmax."""
    weights = read(bridge)
    W_U = weights.final_gain[:, None] * weights.W_U
    scores = weights.directions(0, "out") @ (W_U - W_U.mean(0) if weights.centre else W_U)
    scores = scores - scores.mean(1, keepdim=True)
    top = (torch.arange(len(scores)), map.positive.ids[0, :, 0].long())
    scores[top] = map.null.quantile()[0] * map.std[0]
    return (map.positive.tau[0][:, None] * scores).softmax(1)[top]


def test_a_tokens_probability_by_layer(bridge, two_layers):
    figure = plots.token_by_layer(two_layers, 5)
    band, below, beyond = figure.data
    z = two_layers.tracked[5] / two_layers.std
    outside = z > two_layers.null.quantile()[:, None]
    probs = two_layers.tracked_probs(5)
    assert values(beyond.y) == pytest.approx(probs[outside].tolist())
    assert values(below.y) == pytest.approx(probs[~outside].tolist())
    layer, index, shown_z = values(below.customdata[3])
    assert shown_z == pytest.approx(float(z[int(layer), int(index)]), rel=1e-5)
    assert below.text[3] == theme.quoted(two_layers[int(layer), int(index)].positive[0].token)
    assert band.y[1] == pytest.approx(float(probability_in_place_of_the_top(bridge, two_layers).median()), rel=1e-4)
    assert "probability of" in figure.layout.yaxis.title.text and "layer" in figure.layout.xaxis.title.text


def test_a_token_that_was_not_tracked(maps):
    with pytest.raises(KeyError, match="not tracked"):
        plots.token_by_layer(maps[0], " w8")


def test_one_neuron_with_and_without_its_scores(maps, x, W_U):
    neurons, reading = maps[0], maps[0]["L0N7"]
    plain = named(plots.neuron(neurons, "L0N7"))
    assert values(plain["positive pole"].x) == pytest.approx([hit.z for hit in reading.positive])
    assert values(plain["negative pole"].x) == pytest.approx([-hit.z for hit in reading.negative])
    assert plain["positive pole"].text[0] == "' w9'" and "all tokens" not in plain
    scores = x[7] @ W_U
    full = named(plots.neuron(neurons, "L0N7", scores=scores))
    counts = np.asarray(full["all tokens"].y)
    assert counts[counts >= 1].sum() == V, "every token in one bin"
    with pytest.raises(ValueError, match=r"scores: expected shape \(60,\)"):
        plots.neuron(neurons, "L0N7", scores=scores[:-1])
    with pytest.raises(ValueError, match="give those of this neuron"):
        plots.neuron(neurons, "L0N7", scores=x[6] @ W_U)


def test_specialisation_by_layer(two_layers):
    figure = plots.specialisation(two_layers)
    null, neurons, largest, null_kurtosis, kurtosis, _ = figure.data
    tops = torch.cat([two_layers.positive.z[..., 0], two_layers.negative.z[..., 0]], dim=1)
    assert values(neurons.median) == pytest.approx(tops.double().quantile(0.5, dim=1).tolist())
    assert values(null.q3) == pytest.approx(two_layers.null.quantile(0.75).tolist(), rel=1e-5)
    assert values(kurtosis.upperfence) == pytest.approx(two_layers.kurtosis.double().quantile(0.99, dim=1).tolist())
    assert values(null_kurtosis.median) == pytest.approx(
        two_layers.null.quantile(0.5, of="kurtosis").tolist(), abs=1e-6
    )
    layer, index = (int(part) for part in largest.customdata[0])
    best = max(*two_layers[layer, index].positive, *two_layers[layer, index].negative, key=lambda hit: hit.z)
    assert largest.y[0] == pytest.approx(best.z) == pytest.approx(float(tops[0].max()))
    assert largest.text[0] == theme.quoted(best.token)


def test_agreement_by_layer_and_by_specialisation(maps):
    comparison = compare(*maps)
    own, null, parts = plots.agreement(comparison, parts=4).data
    assert values(own.y) == pytest.approx(comparison.by_layer.tolist())
    assert values(null.y) == pytest.approx(comparison.null_by_layer.tolist())
    assert values(parts.y) == pytest.approx(comparison.by_specialisation(4)["agreement"].tolist())


def test_where_changed_neurons_sit(maps):
    comparison = compare(*maps)
    same, other = plots.changed(comparison).data
    assert len(same.x) == int(comparison.same_top.sum()) and len(other.x) == int((~comparison.same_top).sum()) > 0
    index = int(other.customdata[0][1])
    before, after = (map[0, index].positive[0].token for map in maps)
    assert other.text[0] == f"{before!r} → {after!r}" and before != after
    assert other.y[0] == pytest.approx(maps[0][0, index].positive[0].z)


def test_a_dose_curve(bridge):
    curve = clamp_sweep(bridge, "L1N3", [8.0, 0.0], ["a dog", "the red house"], [" dog", 5])
    figure = plots.dose_curve(curve)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [line.name for line in lines] == ["' dog'", repr(curve.tokens[1])]
    assert values(lines[0].x) == [0.0, 8.0]
    assert values(lines[0].y) == pytest.approx(curve.prob[[1, 0], :, 0].mean(1).tolist())
    assert [shape.y0 for shape in figure.layout.shapes] == pytest.approx(curve.unclamped_prob.mean(0).tolist())


def test_validation_beside_its_controls(validation):
    figure = plots.validation(validation, validation)
    controls = [trace for trace in figure.data if trace.type == "violin"]
    assert values(controls[1].y) == pytest.approx(validation.control_effects.flatten().tolist())
    dots = [trace for trace in figure.data if trace.type == "scatter"]
    shown = {row[0]: y for trace in dots for row, y in zip(trace.customdata, trace.y, strict=True)}
    assert shown == pytest.approx({record["neuron"]: record["dlogp"] for record in validation.records})
    assert f"{validation.share_raised():.0%} raised" in figure.layout.xaxis.ticktext[0]
    with pytest.raises(ValueError, match="at least one Validation"):
        plots.validation()


def test_lens_effects():
    columns = pd.Index(["layer", "dose", "reading", "correlation"])
    rows = [
        (layer, dose, name, layer / 4 + dose / 40)
        for layer in (0, 1)
        for dose in (1.0, 5.0)
        for name in ("lens", "plain")
    ]
    figure = plots.lens_effects(pd.DataFrame(rows, columns=columns))
    assert [values(trace.y) for trace in figure.data] == [[0.025, 0.275]] * 2 + [[0.125, 0.375]] * 2
    frame = pd.DataFrame(rows, columns=columns).assign(ceiling=0.9)
    dotted = [trace for trace in plots.lens_effects(frame).data if trace.name == "ceiling"]
    assert [values(trace.y) for trace in dotted] == [[0.9, 0.9]] * 2
    with pytest.raises(ValueError, match="reading, correlation missing"):
        plots.lens_effects(pd.DataFrame(rows, columns=columns).drop(columns=["reading", "correlation"]))


def test_the_atlas_keeps_the_principal_components(maps, x):
    hits = maps[0].specialised(40, quantile=0.5)
    rows = torch.stack([x[hit.neuron.index] * (1 if hit.pole == "positive" else -1) for hit in hits])
    figure = plots.neuron_atlas(x[[hit.neuron.index for hit in hits]], hits, clusters=3)
    unit = torch.nn.functional.normalize(rows, dim=1)
    shares = torch.linalg.svdvals(unit - unit.mean(0)).square()
    points = np.concatenate([np.stack([trace.x, trace.y], axis=1) for trace in figure.data])
    assert len(points) == len(hits) and len(figure.data) == 3
    assert points.var(0) / (unit - unit.mean(0)).square().mean(0).sum().item() == pytest.approx(
        shares[:2] / shares.sum(), rel=1e-4
    )
    shown = {(int(row[1]), text) for t in figure.data for row, text in zip(t.customdata, t.text, strict=True)}
    assert shown == {(hit.neuron.index, theme.quoted(hit.token)) for hit in hits}
    with pytest.raises(ValueError, match=r"expected \[80, d_model\]"):
        plots.neuron_atlas(x[:5], maps[0])
    with pytest.raises(ValueError, match="1 to 6"):
        plots.neuron_atlas(x, maps[0], clusters=7)
    with pytest.raises(ValueError, match="at least 3 neurons, got 0"):
        plots.neuron_atlas(x[:0], maps[0].specialised(3)[:0])


def test_a_map_and_its_hits_give_one_atlas(maps, x):
    whole = plots.neuron_atlas(x, maps[0], clusters=1).data[0]
    hits = maps[0].specialised(N, quantile=0.0)
    assert len(hits) == N, "each pole's z exceeds the null's lowest"
    listed = plots.neuron_atlas(x[[hit.neuron.index for hit in hits]], hits, clusters=1).data[0]
    order = np.argsort(listed.customdata[:, 1])
    assert values(np.asarray(listed.x)[order]) == pytest.approx(values(whole.x), abs=1e-4)
    assert np.asarray(listed.text)[order].tolist() == list(whole.text)


def all_figures(maps, x, two_layers, validation, curve, look):
    comparison = compare(*maps)
    frame = pd.DataFrame({"layer": [0, 1], "dose": 1.0, "reading": "plain", "correlation": [0.5, 0.9]})
    return [
        plots.token_by_layer(two_layers, 5, theme=look),
        plots.neuron(maps[0], "L0N8", theme=look),
        plots.specialisation(two_layers, theme=look),
        plots.agreement(comparison, parts=4, theme=look),
        plots.changed(comparison, theme=look),
        plots.dose_curve(curve, theme=look),
        plots.validation(validation, theme=look),
        plots.lens_effects(frame, theme=look),
        plots.neuron_atlas(x, maps[0], theme=look),
        plots.concepts(concepts(families.build("llama", "bridge"), ["dog", "cat"], sides=["in", "out"]), theme=look),
        plots.explanation(explain(families.build("llama", "bridge"), "the dog saw a", n=5), theme=look),
    ]


@pytest.fixture(scope="module")
def curve(bridge):
    return clamp_sweep(bridge, "L1N3", [0.0, 8.0], ["a dog"], [" dog"])


@pytest.mark.parametrize("look", ["light", "dark"])
def test_every_figure_is_titled_named_and_themed(maps, x, two_layers, validation, curve, look):
    figures = all_figures(maps, x, two_layers, validation, curve, look)
    assert len(figures) == len(plots.__all__)
    for figure in figures:
        sent = json.dumps(json.loads(figure.to_json()))
        assert figure.layout.title.text and figure.layout.title.subtitle.text
        assert figure.layout.template.layout.paper_bgcolor == theme.of(look).background
        axes = re.findall(r'"[xy]axis\d*": \{[^}]*?"title": \{"text": "[^"]+', sent)
        assert len(axes) >= 2, "both axes are named"
        assert "<b>ex" not in sent and "\\u202e" not in sent.replace("\\\\u202e", ""), "a token is no markup"


def test_the_two_themes_differ_in_colours_alone(maps, x, two_layers, validation, curve):
    light, dark = (
        [figure.to_json() for figure in all_figures(maps, x, two_layers, validation, curve, look)]
        for look in ("light", "dark")
    )
    swap = dict(theme.pairs())
    assert set(swap).isdisjoint(swap.values()), "so that a figure of either theme can be told and recoloured"
    swapped = [re.sub("#[0-9A-F]{6}", lambda match: swap.get(match[0], match[0]), figure) for figure in light]
    assert swapped == dark


def test_an_unknown_theme(two_layers):
    with pytest.raises(ValueError, match='"light" or "dark", got \'pink\''):
        plots.token_by_layer(two_layers, 5, theme="pink")


@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="no chromium to draw with")
def test_a_figure_becomes_a_picture(two_layers, tmp_path):
    pytest.importorskip("kaleido")
    path = tmp_path / "figure.png"
    plots.token_by_layer(two_layers, 5).write_image(path, width=400, height=300)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_neurons_of_experts_are_named_so(maps):
    experts = dataclasses.replace(maps[0], n_experts=4)
    figures = [
        plots.token_by_layer(experts, " w9"),
        plots.specialisation(experts),
        plots.changed(compare(experts, dataclasses.replace(maps[1], n_experts=4))),
        plots.neuron_atlas(torch.randn(N, D), experts),
    ]
    for figure in figures:
        names = [name for trace in figure.data if trace.hovertext is not None for name in trace.hovertext]
        assert names and all(re.fullmatch(r"L0E[0-3]N1?\d", name) for name in names)
    assert "L0E0N7" in [annotation.text for annotation in figures[0].layout.annotations]
    assert "L0E1N3" in plots.neuron(experts, "L0E1N3").layout.title.text


# Zero directions


@pytest.fixture(scope="module")
def pruned(W_U, x):
    directions = x.clone()
    directions[[0, 5, N - 1]] = 0
    return decode_directions(directions, W_U, k=3, tokens=[" w9"], tokenizer=Words()), directions


def test_every_figure_of_a_map_survives_zero_directions(pruned, maps):
    neurons, directions = pruned
    comparison = compare(neurons, maps[0])
    figures = {
        "specialisation": plots.specialisation(neurons),
        "token_by_layer": plots.token_by_layer(neurons, " w9"),
        "neuron": plots.neuron(neurons, "L0N7"),
        "zero": plots.neuron(neurons, "L0N5"),
        "agreement": plots.agreement(comparison),
        "changed": plots.changed(comparison),
        "atlas": plots.neuron_atlas(directions, neurons),
    }
    for name, figure in figures.items():
        assert "Infinity" not in figure.to_json(), name
    [by_z, by_kurtosis] = [trace for trace in figures["specialisation"].data if trace.name == "largest"]
    live = neurons.norm[0] > 0
    tops = torch.cat([neurons.positive.z[0, live, 0], neurons.negative.z[0, live, 0]])
    assert by_z.y[0] == pytest.approx(float(tops.max())) and np.isfinite(by_z.y).all()
    assert by_kurtosis.y[0] == pytest.approx(float(neurons.kurtosis[0, live].max()))
    [medians] = [
        t.median for t in figures["specialisation"].data if t.name == "neurons" and t.offsetgroup == "neurons"
    ][:1]
    assert medians == pytest.approx([float(tops.double().quantile(0.5))])
    assert {len(t.x) for t in figures["changed"].data} == {0, N - 3}


def test_a_model_is_named_without_the_folders_that_it_lies_in(maps, x, two_layers, validation, curve):
    def placed(map, name, **changes):
        return dataclasses.replace(map, source=dataclasses.replace(map.source, model=f"/private/{name}", **changes))

    moved, carried = [placed(map, str(i)) for i, map in enumerate(maps)], placed(two_layers, "tiny", lens="made")
    for figure in all_figures(moved, x, carried, validation, curve, "light"):
        assert "private" not in figure.to_json()
    subtitle = plots.token_by_layer(carried, 5).layout.title.subtitle.text
    assert subtitle.startswith('tiny, side "out", through a lens · ')


def test_concepts_by_layer(bridge):
    table = concepts(bridge, ["dog", "cat", "sea"], sides=["in", "out"])
    figure = plots.concepts(table, theme="dark")
    assert [text.text for text in figure.layout.annotations][:2] == ["W_in", "W_out"]
    for trace, side in zip(figure.data, table.sides, strict=True):
        z = table.z[:, table.readings.index(side)]
        assert tuple(trace.y) == table.names and tuple(trace.x) == ("0", "1")
        for at, name in enumerate(table.names):
            for layer, rows in enumerate(table.rows):
                neuron, signed = trace.customdata[at, layer]
                best = [hit for hit in table.hits(name, 1000, side=side) if hit.neuron.layer == rows.layer][0]
                assert neuron == str(best.neuron) and signed == pytest.approx(best.z, abs=0.006)
                assert trace.z[at, layer] == z[at, rows.start : rows.start + rows.size].abs().max()


@pytest.mark.parametrize(
    "draw",
    [
        plots.specialisation,
        plots.agreement,
        plots.changed,
        plots.concepts,
        plots.dose_curve,
        plots.lens_effects,
        plots.validation,
        lambda given: plots.token_by_layer(given, 3),
        lambda given: plots.neuron(given, "L1N3"),
        lambda given: plots.neuron_atlas(torch.zeros(3, 4), given),
        lambda given: plots.neuron_atlas(given, given),
    ],
)
def test_figures_of_something_else_are_refused(draw):
    for given in (None, "gpt2", [1.0]):
        with pytest.raises(TypeError, match="expected a .*, got "):
            draw(given)


def test_an_explanation(bridge):
    found = explain(bridge, "the dog saw a cat", n=12)
    figure = plots.explanation(found)
    kept = named(figure)["kept alone"]
    assert list(kept.x) == list(found.curve.counts) and values(kept.y) == pytest.approx(
        found.curve.faithfulness.tolist()
    )
    raise_it, lower_it = (named(figure)[name] for name in ("raise it", "lower it"))
    assert len(raise_it.x) == sum(one.effect < 0 for one in found) and len(raise_it.x) + len(lower_it.x) == 12
    largest = max(
        zip((*raise_it.marker.size, *lower_it.marker.size), (*raise_it.customdata, *lower_it.customdata), strict=True),
        key=lambda pair: pair[0],
    )
    assert largest[1][0] == str(found[0].neuron) and largest[1][2] == pytest.approx(-found[0].effect)
    assert figure.layout.xaxis.ticktext[2] == theme.quoted(found.prompt[2])
    assert theme.quoted(found[0].label_out) in [note.text for note in figure.layout.annotations]
    plain = plots.explanation(explain(bridge, "the dog saw a cat", n=4, measure=False))
    assert "kept alone" not in named(plain) and "attributed" in plain.layout.title.subtitle.text
    with pytest.raises(TypeError, match="explanation: expected an Explanation, got dict"):
        plots.explanation(found.to_dict())
