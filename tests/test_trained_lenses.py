"""What lenses of trained models foretell: each method against effects on texts that it was not made of."""

import pytest
import torch

from tests import trained
from tl_flash import check_lens, demo, jacobian_lens

METHODS = ("mean_field", "exact", "mixed")


def correlations(model, texts, tested, methods=METHODS):
    """By layer and reading, of texts that no lens was made of."""
    options = {"mixed": {"exact_prompts": len(texts)}}
    lenses = {method: jacobian_lens(model, texts, method=method, **options.get(method, {})) for method in methods}
    frame = check_lens(model, lenses, tested, n=8, doses=[5.0])
    assert (frame["ceiling"] <= 1).all() and (frame["ceiling"] > 0.9).all()
    return frame.pivot(index="layer", columns="reading", values="correlation")


def holds(found, apart=0.05):
    """In no layer is the mixed lens worse than the exact one of the same texts, nor the mean-field lens by much."""
    assert (found["mixed"] > found["exact"] - 0.01).all(), found
    assert (found["mean_field"] > found["exact"] - apart).all(), found
    assert found["mean_field"][0] > found["plain"][0] + 0.03


def test_the_embedded_model():
    model = demo.load("base")
    rows = [model.to_tokens(text)[0, :40] for text in demo.texts(36)]
    holds(correlations(model, rows[:24], rows[24:]))


@pytest.mark.parametrize("name", trained.CONFIGS)
def test_of_other_families(name):
    rows = trained.tokens(36, seed=3)
    holds(correlations(trained.model(name), rows[:24], rows[24:]))


def test_another_trained_model(stories_bridge):
    torch.manual_seed(0)
    start = stories_bridge.to_tokens("")[:, :1].repeat(36, 1)
    rows = stories_bridge.generate(
        start, max_new_tokens=39, do_sample=True, stop_at_eos=False, verbose=False, return_type="tokens"
    )
    holds(correlations(stories_bridge, rows[:24], rows[24:]), apart=0.09)


def test_a_model_whose_first_embedding_is_zero():
    """A row that training never moved must not spoil the lens."""
    model = demo.load("base")
    rows = [model.to_tokens(text)[0, :40] for text in demo.texts(24)]
    with torch.no_grad():
        model.W_E[rows[0][0]] = 0
    found = correlations(model, rows[:16], rows[16:], METHODS[:2])
    assert (found["mean_field"] > 0.9).all() and (found["exact"] > 0.9).all()


@pytest.mark.parametrize("method", ["mean_field", "exact"])
def test_texts_of_different_lengths_and_without_a_first_token(method):
    model = demo.load("base")
    rows = [model.to_tokens(text)[0, 1 : 20 + i] for i, text in enumerate(demo.texts(24))]
    lens = jacobian_lens(model, rows, method=method)
    frame = check_lens(model, lens, rows[:8], n=4, doses=[5.0], layers=[0])
    correlation = frame.set_index("reading")["correlation"]
    assert correlation["lens"] > 0.9 and correlation["lens"] > correlation["plain"]
