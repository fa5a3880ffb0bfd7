"""The dose window: what is tried, what counts as showing and as reading, and what is refused."""

import math
from functools import partial

import pytest
import torch

from tests import families
from tl_flash import Neuron, activation_stats, clamp, demo, dose_window, flash_decode, plots
from tl_flash.clamps import Prompts, complete_text, residual_length
from tl_flash.evidence.doses import first_guess
from tl_flash.evidence.fluency import Fluency, continuations
from tl_flash.weights import read

PROMPTS = ["a dog", "the cat and a dog ran"]
N_NEW = 6


def test_continuations_are_what_is_completed_one_by_one(bridge):
    prompts = Prompts.of(bridge, PROMPTS)
    for values in ({"L1N3": 0.5}, {"L0N7": -4.0, "L1N1": 3.0}):
        written = continuations(bridge, prompts, N_NEW, held=partial(clamp, bridge, values))
        with clamp(bridge, values):
            expected = [complete_text(bridge, prompt, N_NEW) for prompt in PROMPTS]
        assert [bridge.tokenizer.decode(row, skip_special_tokens=True) for row in written] == expected


def test_fluency_by_hand(bridge):
    prompts, written = Prompts.of(bridge, PROMPTS), [torch.tensor([5, 6, 5, 6, 5]), torch.tensor([9])]
    fluency = Fluency.of(bridge, prompts, written)
    for row, own, perplexity in zip(prompts.rows, written, fluency.perplexity.tolist(), strict=True):
        with torch.no_grad():
            log_probs = bridge(torch.cat([row, own])[None]).double().log_softmax(-1)[0]
        nats = [float(log_probs[len(row) - 1 + i, token]) for i, token in enumerate(own.tolist())]
        assert perplexity == pytest.approx(math.exp(-sum(nats) / len(nats)), rel=1e-4)
    assert fluency.distinct.tolist() == [0.5, 1.0], "two of four bigrams are repeated"


def test_the_residual_streams_length(bridge):
    prompts = Prompts.of(bridge, PROMPTS)
    seen = [bridge.run_with_cache(row[None])[1]["blocks.1.hook_resid_post"][0, 1:] for row in prompts.rows]
    expected = float(torch.cat(seen).square().sum(-1).mean().sqrt())
    assert residual_length(bridge, prompts, [1])[1] == pytest.approx(expected, rel=1e-5)


def test_the_first_guess_writes_half_as_long_as_the_stream(bridge):
    prompts, units = Prompts.of(bridge, PROMPTS), {Neuron(1, 3): 2.0, Neuron(1, 4): -1.0, Neuron(0, 1): 1e-6}
    guess = first_guess(bridge, units, prompts)
    out = read(bridge).directions(1, "out")
    written = guess * (2.0 * out[3] - out[4])
    assert float(written.norm()) == pytest.approx(0.5 * residual_length(bridge, prompts, [1])[1], rel=1e-4)


def test_what_is_tried_is_what_was_asked_for(bridge):
    window = dose_window(bridge, {"L1N3": 2.0}, PROMPTS, tokens=[5], doses=[4.0, 1.0], max_new_tokens=3)
    assert window.doses.tolist() == [0.0, 1.0, 4.0] and window.shows.shape == (3, 2)
    frame = window.to_frame()
    assert frame["perplexity_ratio"][0] == frame["distinct_ratio"][0] == 1 and frame["reads"][0]


@pytest.fixture(scope="module")
def dog():
    """The embedded instruct model's dog neuron, and what a window found for it."""
    model = demo.load("instruct")
    hit = flash_decode(model, side="out").find(" dog", n=1)[0]
    largest = activation_stats(model, demo.texts(50), layers=[hit.neuron.layer])[hit.neuron].abs_max
    unit = largest if hit.pole == "positive" else -largest
    questions = [demo.ask(question) for question in demo.favourite_questions("animal")[:6]]
    return model, dose_window(model, {hit.neuron: unit}, questions, "dog", max_new_tokens=10)


def test_a_trained_models_window_is_open(dog):
    _, window = dog
    assert window.open and window.low <= window.high
    shown = dict(zip(window.doses.tolist(), window.share_shown.tolist(), strict=True))
    assert shown[0.0] < 0.5 <= shown[window.low]
    assert all(share < 0.5 for dose, share in shown.items() if dose < window.low)
    assert window.clamps() == {neuron: window.low * unit for neuron, unit in window.units.items()}
    assert "shows from" in repr(window) and "perplexity_ratio" in str(window)


def test_both_its_ends_are_known_to_nine_percent(dog):
    _, window = dog
    doses = window.doses.tolist()
    below, above = doses[doses.index(window.low) - 1], doses[doses.index(window.high) + 1]
    for ratio in (window.low / below, above / window.high):
        assert ratio == pytest.approx(2**0.125, rel=1e-5)


def test_its_picture(dog):
    figure = plots.dose_curve(dog[1], theme="dark")
    assert [trace.name for trace in figure.data] == ["speak of 'dog'", "perplexity", "distinct bigrams"]
    assert list(figure.data[0].y) == dog[1].share_shown[1:].tolist()
    told, doses = figure.layout.xaxis.tickvals, dog[1].doses[1:].tolist()
    assert set(told) < set(doses), "labels stood on one another"
    width = math.log(doses[-1] / doses[0])
    assert all(math.log(above / below) >= 0.08 * width for below, above in zip(told, told[1:], strict=False))


def test_a_word_that_never_shows_has_no_dose(dog):
    model, window = dog
    never = dose_window(model, window.units, ["One day,"], "zebu", doses=[0.5], max_new_tokens=3)
    assert never.low is None and not never.open and "shows at no dose" in repr(never)
    with pytest.raises(ValueError, match="'zebu' shows .* at no dose up to 0.5; give other neurons"):
        never.clamps()


def test_a_word_that_shows_without_a_clamp_opens_no_window(bridge):
    written = continuations(bridge, Prompts.of(bridge, PROMPTS), 3)
    tokens = [int(row[0]) for row in written]
    window = dose_window(bridge, {"L1N3": 1e-3}, PROMPTS, tokens=tokens, doses=[0.5], max_new_tokens=3)
    assert window.low is None and not window.open and "shows without a clamp" in repr(window)
    with pytest.raises(ValueError, match="100% of the completions without a clamp"):
        window.clamps()


def test_a_completion_may_fill_the_context_and_no_more(bridge):
    prompt, n_ctx = torch.full((1, bridge.cfg.n_ctx - 2), 5), bridge.cfg.n_ctx
    given = {"tokens": [5], "doses": [1.0]}
    dose_window(bridge, {"L1N3": 1.0}, prompt, max_new_tokens=3, **given)
    with pytest.raises(ValueError, match=f"within n_ctx = {n_ctx} tokens, got {n_ctx - 2} and 4"):
        dose_window(bridge, {"L1N3": 1.0}, prompt, max_new_tokens=4, **given)


def test_a_neuron_that_writes_nothing_has_no_first_guess(bridge):
    model = families.copied(bridge)
    with torch.no_grad():
        families.held_W_out(model, 1)[3] = 0
    with pytest.raises(ValueError, match="L1N3 write nothing"):
        dose_window(model, {"L1N3": 1.0}, PROMPTS, tokens=[5])


def test_other_kinds_are_refused(bridge):
    for neurons in (["L1N3"], {"L1N3": "2"}):
        with pytest.raises(TypeError, match="expected a"):
            dose_window(bridge, neurons, PROMPTS, tokens=[5])
    with pytest.raises(TypeError, match="word: expected a word, got int"):
        dose_window(bridge, {"L1N3": 1.0}, PROMPTS, 5)
    with pytest.raises(TypeError, match="doses: expected a list of numbers, got 2.0"):
        dose_window(bridge, {"L1N3": 1.0}, PROMPTS, tokens=[5], doses=2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neurons": {}}, "neurons: expected at least one"),
        ({"neurons": {"L1N3": 0.0}}, "not 0"),
        ({"neurons": {"L1N3": 1.0, (1, 3): 2.0}}, "named twice"),
        ({"neurons": {"L9N3": 1.0}}, "layers from 0 to 1, got 9"),
        ({"neurons": {"L1N9999": 1.0}}, "indices below d_mlp"),
        ({"mode": "multiply"}, "doses: expected a list"),
        ({"share": 50}, "share: expected"),
        ({"most_perplexity": math.nan}, "most_perplexity"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number"),
        ({"max_new_tokens": 1000}, "within n_ctx"),
        ({"tokens": None}, "word: expected a word or tokens=, got neither"),
        ({"word": "dog"}, "got both"),
        ({"word": " ", "tokens": None}, "word: expected a word, got ' '"),
        ({"tokens": []}, "tokens: expected at least one"),
        ({"doses": []}, "doses: expected at least one"),
        ({"doses": [-1.0]}, "doses: .* above 0"),
        ({"prompts": []}, "prompts: expected at least one"),
    ],
)
def test_what_is_refused(bridge, changes, message):
    given = {"neurons": {"L1N3": 1.0}, "prompts": PROMPTS, "tokens": [5]} | changes
    with pytest.raises(ValueError, match=message):
        dose_window(bridge, given.pop("neurons"), given.pop("prompts"), given.pop("word", None), **given)
