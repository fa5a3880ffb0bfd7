import dataclasses

import pytest
import torch
from scipy.stats import t as student

from tests import families
from tl_flash import activation_stats, clamp, decode_directions, flash_decode, jacobian_lens, validate
from tl_flash.clamps import NEUTRAL_PROMPTS, Answers, Prompts
from tl_flash.evidence import COLUMNS, chance_of
from tl_flash.evidence.labels import own_labels
from tl_flash.weights import read

PROMPTS = ["a dog", "the cat and a dog ran", "the red house"]


@pytest.fixture(scope="module", params=["bridge", "hooked"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def hits(model):
    return flash_decode(model, side="out").specialised(3, quantile=0.9)


@pytest.fixture(scope="module")
def result(model, hits):
    return validate(model, hits, prompts=PROMPTS, controls=4)


def test_each_figure_is_what_one_clamp_gives(model, hits, result):
    frame = result.to_frame()
    assert tuple(frame.columns) == COLUMNS and len(frame) == 3
    prompts = Prompts.of(model, PROMPTS)
    before = Answers.of(model, prompts)
    for hit, (i, row) in zip(hits, frame.iterrows(), strict=True):
        with clamp(model, {hit.neuron: row["value"]}):
            after = Answers.of(model, prompts)
        token = hits.token_id(hit)
        change = after.log_probs - before.log_probs
        assert row["dlogp"] == pytest.approx(float(change[:, token].mean()), abs=1e-5)
        assert row["dlogit"] == pytest.approx(float((after.logits - before.logits)[:, token].mean()), abs=1e-5)
        assert row["rank_after"] == float((after.logits > after.logits[:, [token]]).sum(1).double().median())
        top = hits.pole_ids(hit).tolist()
        raised = change.mean(0).argsort(descending=True)[: len(top)].tolist()
        assert row["overlap"] == pytest.approx(len({*top} & {*raised}) / len(top))
        kl = torch.nn.functional.kl_div(after.log_probs, before.log_probs, reduction="batchmean", log_target=True)
        assert row["kl"] == pytest.approx(float(kl), abs=1e-5)
        assert 0 <= row["output_score"] <= 1 and row["perplexity_ratio"] > 0
        assert row["dlogp_low"] <= row["dlogp"] <= row["dlogp_high"]
        assert row["control_dlogp"] == pytest.approx(float(result.control_effects[i].mean()), abs=1e-6)


def test_a_write_label_is_raised_more_than_its_controls(result):
    assert result.share_raised() == 1
    assert result.to_frame()["dlogp"].median() > float(result.control_effects.median())
    assert "labels raised" in repr(result) and "q_value" in str(result) and "<table" in result._repr_html_()


def test_the_dose_is_in_the_neurons_own_units(model, hits, result):
    for hit, row in zip(hits, result.records, strict=True):
        largest = 0.0
        for prompt in PROMPTS:
            _, cache = model.run_with_cache(model.to_tokens(prompt))
            act = cache[f"blocks.{hit.neuron.layer}.mlp.hook_post"][0, :, hit.neuron.index]
            start = int(model.to_tokens(prompt)[0, 0] == model.tokenizer.bos_token_id)
            largest = max(largest, float(act[start:].abs().max()))
        assert abs(row["value"]) == pytest.approx(5 * largest, rel=1e-4)
        assert (row["value"] > 0) == (hit.pole == "positive")


def test_the_units_may_come_from_other_texts(model, hits):
    stats = activation_stats(model, ["the red house and the cat", "a dog ran"])
    for hit, row in zip(hits, validate(model, hits, prompts=PROMPTS, controls=2, stats=stats).records, strict=True):
        assert abs(row["value"]) == pytest.approx(5 * stats[hit.neuron].abs_max, rel=1e-6)


def test_the_dose_may_be_chosen(model, hits, result):
    weaker = validate(model, hits, prompts=PROMPTS, controls=2, dose=1.0)
    for row, full in zip(weaker.records, result.records, strict=True):
        assert row["value"] == pytest.approx(full["value"] / 5, rel=1e-5)
    for wrong, error, message in [
        (0, ValueError, "above 0"),
        (float("inf"), ValueError, "above 0"),
        ("5", TypeError, "dose: expected a number, got '5'"),
    ]:
        with pytest.raises(error, match=message):
            validate(model, hits, prompts=PROMPTS, controls=2, dose=wrong)
    with pytest.raises(ValueError, match="dose: .* would not be used with value=3.0"):
        validate(model, hits, prompts=PROMPTS, controls=2, value=3.0, dose=2.0)


def test_stats_that_would_not_be_used_are_refused(model, hits):
    with pytest.raises(ValueError, match="would not be used"):
        validate(model, hits, prompts=PROMPTS, value=2.5, stats=activation_stats(model, PROMPTS))
    with pytest.raises(TypeError, match="stats: expected"):
        validate(model, hits, prompts=PROMPTS, stats=5.0)


def test_in_labels_are_clamped_by_the_sign_of_write_z(model):
    hits = flash_decode(model, side="in").specialised(6, quantile=0.5)
    for hit, row in zip(hits, validate(model, hits, prompts=PROMPTS, controls=2).records, strict=True):
        assert (row["value"] > 0) == (hit.write_z > 0)


def test_an_effect_that_its_controls_have_too_is_no_evidence():
    assert chance_of(-1e-7, torch.full((5,), -1e-7)) == pytest.approx(0.5)
    assert chance_of(2e-7, torch.zeros(5)) > 0.3, "less than rounding"
    assert chance_of(1.0, torch.zeros(5)) < 1e-9
    controls = torch.tensor([0.1, -0.2, 0.3, 0.05])
    spread = float(controls.double().std()) * (1 + 1 / 4) ** 0.5
    expected = student.sf((1 - float(controls.double().mean())) / spread, 3)
    assert chance_of(1.0, controls) == pytest.approx(expected, rel=1e-9)


def test_it_is_seeded(model, hits, result):
    again = validate(model, hits, prompts=PROMPTS, controls=4)
    assert torch.equal(again.control_effects, result.control_effects)
    other = validate(model, hits, prompts=PROMPTS, controls=4, seed=1)
    assert not torch.equal(other.control_effects, result.control_effects)


def test_a_value_of_the_users_own(model, hits):
    assert {row["value"] for row in validate(model, hits, prompts=PROMPTS, value=2.5, controls=2).records} == {2.5}


def test_a_map_stands_for_its_most_specialised_neurons(model):
    map = flash_decode(model, side="out")
    expected = [str(hit.neuron) for hit in map.specialised(2)]
    if not expected:
        with pytest.raises(ValueError, match="at least one neuron"):
            validate(model, map, n=2)
    else:
        assert [row["neuron"] for row in validate(model, map, n=2, prompts=PROMPTS, controls=2).records] == expected


def test_wrong_arguments_are_refused(model, hits):
    with pytest.raises(TypeError, match="NeuronMap, Hits or a dict"):
        validate(model, ["L0N3"])
    with pytest.raises(ValueError, match="at least one neuron"):
        validate(model, hits[:0])
    with pytest.raises(ValueError, match="controls: expected 2"):
        validate(model, hits, controls=1)
    for value in ("much", float("nan"), float("inf")):
        with pytest.raises(ValueError, match='value: expected a number or "auto"'):
            validate(model, hits, value=value)
    for value in (None, [2.0], True, torch.tensor([1.0, 2.0])):
        with pytest.raises(TypeError, match='value: expected a number or "auto"'):
            validate(model, hits, value=value)
    directions = decode_directions(torch.randn(40, model.cfg.d_model), model).specialised(2, quantile=0.5)
    with pytest.raises(ValueError, match='side "in", "gate" or "out"'):
        validate(model, directions)


def test_labels_of_another_model_are_refused(model):
    map = flash_decode(model, side="out")
    other = dataclasses.replace(map, positive=dataclasses.replace(map.positive, logits=map.positive.logits * 1.1))
    other = dataclasses.replace(other, negative=dataclasses.replace(map.negative, logits=map.negative.logits * 1.1))
    with pytest.raises(ValueError, match="a map of another model"):
        validate(model, other.specialised(3, quantile=0.5), prompts=PROMPTS)


def test_the_default_prompts_serve(model, hits):
    assert validate(model, hits[:1], controls=2).prompts == len(NEUTRAL_PROMPTS)


# Silent neurons, and labels of one's own


def silenced(model, hit):
    """The model with one neuron that is 0 on every text."""
    quiet = families.copied(model)
    with torch.no_grad():
        quiet.blocks[hit.neuron.layer].mlp.W_gate[:, hit.neuron.index] = 0
    return quiet


def test_a_silent_neuron_is_listed_and_left_out(model, hits, result):
    quiet = silenced(model, hits[1])
    tested = validate(quiet, hits, prompts=PROMPTS, controls=4, seed=3)
    assert tested.silent == (str(hits[1].neuron),)
    assert [row["neuron"] for row in tested.records] == [str(hits[0].neuron), str(hits[2].neuron)]
    assert f"1 silent on the prompts: {hits[1].neuron}" in repr(tested) and len(tested.control_effects) == 2
    assert result.silent == () and "silent" not in repr(result)
    both = validate(quiet, hits[::2], prompts=PROMPTS, controls=4, seed=3)
    assert both.to_frame().equals(tested.to_frame())


def test_neurons_that_are_all_silent_are_refused_and_the_advice_works(model, hits):
    quiet = silenced(model, hits[0])
    with pytest.raises(ValueError, match="give a value, or stats="):
        validate(quiet, hits[:1], prompts=PROMPTS, controls=2)
    assert len(validate(quiet, hits[:1], prompts=PROMPTS, controls=2, value=2.0).records) == 1
    stats = activation_stats(model, PROMPTS)  # as on texts where it is active
    assert len(validate(quiet, hits[:1], prompts=PROMPTS, controls=2, stats=stats).records) == 1


def test_labels_of_ones_own_are_tested_as_a_maps(model, hits, result):
    own = validate(model, {hit.neuron: hits.token_id(hit) for hit in hits}, prompts=PROMPTS, controls=4)
    assert own.side == "out"
    assert torch.allclose(own.control_effects, result.control_effects, atol=1e-5)
    for row, other in zip(own.records, result.records, strict=True):
        for name in COLUMNS:
            expected = pytest.approx(other[name], abs=1e-4) if isinstance(other[name], float) else other[name]
            assert row[name] == expected, name


def test_the_dose_of_ones_own_label_has_the_sign_that_writes_it(model):
    neurons = flash_decode(model, side="out", k=2)
    worst = int(neurons.negative.ids[1, 3, 0])
    [row] = validate(model, {"L1N3": worst}, prompts=PROMPTS, controls=3).records
    assert row["pole"] == "negative" and row["value"] < 0 and row["write_z"] < 0
    assert row["write_z"] == pytest.approx(-float(neurons.negative.z[1, 3, 0]), rel=1e-4)
    middling = validate(model, {(1, 3): " dog"}, prompts=PROMPTS, controls=3).records[0]
    assert middling["token"] == " dog" and middling["neuron"] == "L1N3"


def test_the_rank_of_ones_own_label_is_its_own(model):
    map = flash_decode(model, side="out", k=72)
    id = int(map.positive.ids[1, 3, 30])
    [hit] = hits = own_labels(model, read(model), {"L1N3": id})
    pole = map.pole(hit.pole)
    assert hit.rank == pole.ids[1, 3].tolist().index(id) >= hits.ids.shape[1]
    assert hits.token_id(hit) == id and hits.pole_ids(hit).tolist() == pole.ids[1, 3, :10].tolist()
    [other] = own_labels(model, read(model), {"L1N3": int(map.negative.ids[1, 3, 2])})
    assert (other.pole, other.rank) == ("negative", 2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "at least one neuron"),
        ({"L0N3": "no such token"}, "expected one token"),
        ({"L9N3": " dog"}, "no neuron of this model"),
        ({"L0N3": " dog", (0, 3): " cat"}, "each neuron once"),
    ],
)
def test_labels_of_ones_own_that_name_nothing_are_refused(model, labels, message):
    with pytest.raises(ValueError, match=message):
        validate(model, labels, controls=2)


def test_labels_through_a_lens_made_on_the_way(model):
    hits = flash_decode(model, side="out", lens="auto").specialised(2, quantile=0.5)
    options = dict(prompts=PROMPTS, controls=3)
    auto = validate(model, hits, lens="auto", **options)
    given = validate(model, hits, lens=jacobian_lens(model), **options)
    assert auto.reading == 'side "out", through a lens' and auto.reading in repr(auto)
    assert auto.to_frame()["dlogp"].tolist() == given.to_frame()["dlogp"].tolist()
    for options in ({}, {"lens": jacobian_lens(model, PROMPTS)}):
        with pytest.raises(ValueError, match="the lens that the map was made with"):
            validate(model, hits, **options)
    plain = flash_decode(model, side="out").specialised(2, quantile=0.5)
    with pytest.raises(ValueError, match="none where it was made without"):
        validate(model, plain, lens="auto")
