import dataclasses

import numpy as np
import pytest
import torch

from tl_flash import compare, decode_directions, flash_decode
from tl_flash.decode import job
from tl_flash.decode.null import NULL_DRAWS
from tl_flash.weights import read


@pytest.fixture(scope="module")
def neurons(bridge):
    return flash_decode(bridge, k=4, tokens=[" dog", 5])


def test_the_shapes_are_the_models(neurons, bridge):
    cfg = bridge.cfg
    d_mlp = bridge.blocks[0].mlp.W_in.shape[1]
    assert neurons.positive.ids.shape == neurons.negative.write_z.shape == (cfg.n_layers, d_mlp, 4)
    assert neurons.positive.ids.dtype == torch.int32 and neurons.positive.logits.dtype == torch.float32
    assert neurons.norm.shape == neurons.positive.log_z.shape == (cfg.n_layers, d_mlp)
    assert neurons.null.z.shape == (cfg.n_layers, 2 * NULL_DRAWS)
    assert (neurons.n_layers, neurons.d_mlp, neurons.d_vocab) == (cfg.n_layers, d_mlp, cfg.d_vocab)
    assert neurons.layers == tuple(range(cfg.n_layers))


def test_probabilities_are_those_of_the_final_norm_and_unembedding(neurons, bridge):
    """softmax(unembed(ln_final(x))), run through the model's own modules."""
    weights = read(bridge)
    x = weights.directions(1, "in")
    with torch.no_grad():
        logits = bridge.ln_final(1e4 * x[None]) @ bridge.W_U  # large, so that the norm's eps is nothing
    probs = logits[0].softmax(-1)
    for pole, sign in ((neurons.positive, 1), (neurons.negative, -1)):
        own = (sign * logits[0]).softmax(-1).gather(1, pole.ids[1].long())
        assert torch.allclose(pole.probs[1], own, rtol=1e-3, atol=1e-7)
    assert torch.allclose(neurons.tracked_probs(" dog")[1], probs[:, neurons.vocab.id(" dog")], rtol=1e-3, atol=1e-7)


def test_layers_can_be_chosen(neurons, bridge):
    second = flash_decode(bridge, k=4, layers=[1])
    assert second.layers == (1,) and second.n_layers == neurons.n_layers
    assert torch.equal(second.positive.ids[0], neurons.positive.ids[1])
    assert second["L1N3"].positive[0].token == neurons["L1N3"].positive[0].token
    backwards = flash_decode(bridge, k=4, layers=[1, 0])
    assert torch.equal(backwards.positive.ids.flip(0), neurons.positive.ids)
    assert str(backwards["L1N3"]) == str(neurons["L1N3"])
    with pytest.raises(KeyError, match="L0N3"):
        second["L0N3"]


def test_padded_ids_are_never_reported(neurons):
    padding = neurons.vocab.nameless()
    assert len(padding) == 97 - 72, "else this test shows nothing"
    for pole in (neurons.positive, neurons.negative):
        assert not torch.isin(pole.ids, torch.tensor(padding)).any()


def test_ignored_tokens_are_never_reported_and_change_no_number(neurons, bridge):
    ignored = flash_decode(bridge, k=4, ignore_tokens=[" dog", 0, 1, 2])
    dog = neurons.vocab.id(" dog")
    assert (neurons.positive.ids == dog).any() and not (ignored.positive.ids == dog).any()
    assert torch.equal(ignored.std, neurons.std)
    assert torch.equal(ignored.positive.log_z, neurons.positive.log_z)


def test_the_fast_precision_is_recorded(bridge):
    assert flash_decode(bridge, k=2, precision="fast").source.precision == "fast"


def test_a_low_precision_model_is_read_as_it_is(bridge):
    weights = read(bridge)
    half = decode_directions(weights.directions(0, "in").bfloat16(), bridge.W_U.bfloat16(), k=3)
    full = decode_directions(weights.directions(0, "in").bfloat16().float(), bridge.W_U.bfloat16().float(), k=3)
    assert torch.equal(half.positive.ids, full.positive.ids)


def test_directions_take_the_models_folding(bridge, neurons):
    x = read(bridge).directions(0, "in")
    assert torch.equal(decode_directions(x, bridge, k=4).positive.ids[0], neurons.positive.ids[0])
    literal = decode_directions(x, bridge.W_U.detach(), k=4, tokenizer=bridge.tokenizer)
    assert torch.equal(decode_directions(x, bridge, k=4, fold_ln=False).positive.ids, literal.positive.ids)
    assert not torch.equal(literal.positive.ids[0], neurons.positive.ids[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "up"}, "side: expected"),
        ({"score": "euclid"}, "score: expected"),
        ({"precision": "half"}, "precision: expected"),
        ({"k": 0}, "k: expected 1"),
        ({"k": 98}, "k: expected 1 to 72"),
        ({"layers": []}, "layers: expected at least one"),
        ({"layers": [2]}, "layers: expected layers from 0 to 1"),
        ({"layers": [-1]}, "layers: expected layers from 0 to 1"),
        ({"layers": [0, 0]}, "each layer once"),
        ({"tokens": [" dog cat"]}, r"expected one token.* it is \d+: \["),
        ({"tokens": [97]}, "from 0 to 96"),
        ({"ignore_tokens": [-1]}, "from 0 to 96"),
        ({"max_bytes": 10}, "max_bytes: expected at least"),
    ],
)
def test_wrong_options_are_refused(bridge, options, message):
    with pytest.raises(ValueError, match=message):
        flash_decode(bridge, **options)


@pytest.mark.parametrize("options", [{"tokens": " dog"}, {"layers": ["0"]}, {"tokens": [1.5]}])
def test_options_of_another_kind_are_refused(bridge, options):
    with pytest.raises(TypeError):
        flash_decode(bridge, **options)


@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear(2, 2), b"gpt2"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match="expected a HookedTransformer"):
        flash_decode(model)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.zeros(0, 40), "at least one row"),
        (torch.full((3, 40), torch.nan), "NaN"),
        (torch.ones(3, 41), "expected shape"),
    ],
)
def test_wrong_directions_are_refused(bridge, directions, message):
    with pytest.raises(ValueError, match=message):
        decode_directions(directions, bridge)


def test_directions_of_another_kind_are_refused(bridge):
    for directions in (torch.ones(3, 40, dtype=torch.long), np.ones((3, 40), dtype=int), [[1.0] * 40]):
        with pytest.raises(TypeError):
            decode_directions(directions, bridge)


def test_a_neuron_that_cannot_be_read_is_named(bridge, monkeypatch):
    weights = read(bridge)
    holed = weights.layer(1).W_in.clone()
    holed[7] = 3e38
    broken = dataclasses.replace(
        weights, read_layer=lambda layer: dataclasses.replace(weights.layer(layer), W_in=holed)
    )
    monkeypatch.setattr(job, "read", lambda *_, **__: broken)
    with pytest.raises(ValueError, match="layer 1.*row 7"):
        flash_decode(bridge, layers=[1])


def test_the_source_says_whether_the_unembedding_came_centred(bridge, hooked):
    assert not flash_decode(bridge, k=1).source.center_unembed
    assert flash_decode(hooked, k=1).source.center_unembed


def test_cosines_of_a_centred_and_an_uncentred_unembedding_are_not_compared(bridge, hooked):
    with pytest.raises(ValueError, match="same center_unembed as a, False; got True"):
        compare(flash_decode(bridge, score="cosine"), flash_decode(hooked, score="cosine"))
    assert compare(flash_decode(bridge), flash_decode(hooked)).agreement == 1


# Directions and unembeddings in other forms


def same(a, b):
    return torch.equal(a.positive.ids, b.positive.ids) and torch.equal(a.positive.logits, b.positive.logits)


@pytest.fixture(scope="module")
def rows():
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(0))


def test_arrays_single_vectors_columns_and_parameters_are_taken(bridge, rows):
    expected = decode_directions(rows, bridge, k=3)
    for given in (rows.numpy(), rows.T, rows.T.numpy(), torch.nn.Parameter(rows), rows.numpy().astype(">f4")):
        assert same(decode_directions(given, bridge, k=3), expected)
    one = decode_directions(rows[2], bridge, k=3)
    assert one.positive.ids.tolist() == [[expected.positive.ids[0, 2].tolist()]]
    assert same(one, decode_directions(rows[2].numpy(), bridge, k=3))


@pytest.mark.parametrize("vector", [False, True])
def test_an_lm_head_is_taken_for_an_unembedding(rows, vector):
    head = torch.randn(97, 40, generator=torch.Generator().manual_seed(1))
    x = rows[0] if vector else rows
    expected = decode_directions(x, head.T, k=3)
    for given in (head, head.numpy(), torch.nn.Parameter(head)):
        assert same(decode_directions(x, given, k=3), expected)
    if not vector:
        assert same(decode_directions(x.T, head, k=3), expected) and same(decode_directions(x.T, head.T, k=3), expected)


def test_square_directions_are_rows(bridge):
    square = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    assert same(decode_directions(square, bridge), decode_directions(square.T.contiguous().T, bridge))
    assert not same(decode_directions(square, bridge), decode_directions(square.T, bridge))


@pytest.mark.parametrize(
    ("x", "W_U", "message"),
    [
        ((5, 40), (41, 97), "in no way"),
        ((6, 4), (6, 4), "in more than one way"),
        ((5, 40), (40, 97, 1), "expected shape"),
        ((5, 40), (40,), "expected an unembedding"),
        ((1, 5, 40), (40, 97), "expected shape"),
    ],
)
def test_what_fits_in_no_way_or_several_says_which_way_round(x, W_U, message):
    with pytest.raises(ValueError, match=rf"{message}.*d_model"):
        decode_directions(torch.randn(x), torch.randn(W_U), k=2)


def test_directions_that_do_not_fit_the_model_say_which_way_round(bridge):
    with pytest.raises(ValueError, match=r"a direction a row, or \[40, n\], a direction a column, got \[3, 41\]"):
        decode_directions(torch.ones(3, 41), bridge)
