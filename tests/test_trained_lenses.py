"""What lenses of trained models foretell: each method against effects on texts that it was not made of."""

import pytest
import torch

from tl_flash import check_lens, demo, jacobian_lens


def correlations(model, texts, tested):
    lenses = {method: jacobian_lens(model, texts, method=method) for method in ("mean_field", "exact")}
    frame = check_lens(model, lenses, tested, n=6, doses=[5.0], layers=[0, len(model.blocks) // 2])
    assert (frame["ceiling"] <= 1).all() and (frame["ceiling"] > 0.9).all()
    return frame.pivot(index="layer", columns="reading", values="correlation")


def holds(found, apart):
    """Both say far more than W_out alone, and the mean-field lens is not much worse than the exact one."""
    assert (found["mean_field"] > found["plain"] + 0.03).all()
    assert (found["mean_field"] > found["exact"] - apart).all()


def test_the_embedded_model():
    model = demo.load("base")
    rows = [model.to_tokens(text)[0, :40] for text in demo.texts(36)]
    holds(correlations(model, rows[:24], rows[24:]), apart=0.05)


def test_another_trained_model(stories_bridge):
    torch.manual_seed(0)
    start = stories_bridge.to_tokens("")[:, :1].repeat(36, 1)
    rows = stories_bridge.generate(
        start, max_new_tokens=39, do_sample=True, stop_at_eos=False, verbose=False, return_type="tokens"
    )
    holds(correlations(stories_bridge, rows[:24], rows[24:]), apart=0.12)


def test_a_model_whose_first_embedding_is_zero():
    """A row that training never moved must not spoil the lens."""
    model = demo.load("base")
    rows = [model.to_tokens(text)[0, :40] for text in demo.texts(24)]
    with torch.no_grad():
        model.W_E[rows[0][0]] = 0
    found = correlations(model, rows[:16], rows[16:])
    assert (found["mean_field"] > 0.9).all() and (found["exact"] > 0.9).all()


@pytest.mark.parametrize("method", ["mean_field", "exact"])
def test_texts_of_different_lengths_and_without_a_first_token(method):
    model = demo.load("base")
    rows = [model.to_tokens(text)[0, 1 : 20 + i] for i, text in enumerate(demo.texts(24))]
    lens = jacobian_lens(model, rows, method=method)
    frame = check_lens(model, lens, rows[:8], n=4, doses=[5.0], layers=[0])
    correlation = frame.set_index("reading")["correlation"]
    assert correlation["lens"] > 0.9 and correlation["lens"] > correlation["plain"]
