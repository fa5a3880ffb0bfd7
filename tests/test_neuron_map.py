import json

import pandas as pd
import pytest
import torch

from tests import families
from tl_flash import Hit, Neuron, NeuronMap, decode_directions, flash_decode
from tl_flash.decode import directions
from tl_flash.decode.null import null_of
from tl_flash.maps import Null
from tl_flash.weights import fingerprint

V, D, N, K = 60, 24, 400, 4


class Words:
    """As much of a tokenizer as a vocabulary asks for."""

    def get_vocab(self):
        return {f"w{id}": id for id in range(V)}

    def batch_decode(self, ids, **_):
        return [f" w{id}" if id != 7 else "<b>\u202ex</b>" for [id] in ids]

    def encode(self, text, **_):
        return [int(word[1:]) for word in text.split()]


@pytest.fixture(scope="module")
def W_U():
    return torch.randn(D, V, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def neurons(W_U):
    directions = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    directions[5] = W_U[:, 9] * 3
    directions[6] = -W_U[:, 9]
    directions[8] = W_U[:, 7]
    return decode_directions(directions, W_U, k=K, tokens=[" w9", 3], tokenizer=Words())


def test_a_hit_is_what_the_tensors_say(neurons):
    hits = neurons.find(" w9", n=1000)
    for hit in hits:
        top = getattr(neurons, hit.pole)
        place = (0, hit.neuron.index, hit.rank)
        assert top.ids[place] == 9 == hits.token_id(hit) and hit.token == " w9"
        assert hit.logit == pytest.approx(top.logits[place].item())
        assert hit.prob == pytest.approx(top.probs[place].item(), rel=1e-4)
        assert hit.z == pytest.approx(top.z[place].item(), rel=1e-5)
        assert hit.write_z == pytest.approx(top.write_z[place].item())
    held = sum(int((getattr(neurons, pole).ids == 9).any(-1).sum()) for pole in ("positive", "negative"))
    assert len(hits) == held


@pytest.mark.parametrize("by", ["z", "prob", "write", "coherence"])
def test_find_ranks(neurons, by):
    key = {
        "z": lambda hit: hit.z,
        "prob": lambda hit: hit.prob,
        "write": lambda hit: abs(hit.write_z),
        "coherence": lambda hit: min(hit.z, abs(hit.write_z)),
    }[by]
    keys = [key(hit) for hit in neurons.find(9, n=1000, by=by)]
    assert keys == sorted(keys, reverse=True) and len(keys) > 10
    assert [key(hit) for hit in neurons.find(9, n=3, by=by)] == keys[:3]


def test_planted_neurons_are_found_at_their_pole(neurons):
    best = neurons.find(" w9", n=2)
    assert {(hit.neuron, hit.pole) for hit in best} == {((0, 5), "positive"), ((0, 6), "negative")}
    assert neurons.find(" w9", pole="negative")[0].neuron == (0, 6)
    assert all(hit.pole == "negative" for hit in neurons.find(" w9", pole="negative"))
    assert {(0, 5), (0, 6), (0, 8)} <= {hit.neuron for hit in neurons.specialised(8)}


def test_write_z_of_a_direction_is_its_own_signed_z(neurons):
    assert torch.allclose(neurons.positive.write_z, neurons.positive.z)
    assert torch.allclose(neurons.negative.write_z, -neurons.negative.z)


def test_specialised_is_above_the_null(neurons):
    hits = neurons.specialised(n=10**6)
    bar = neurons.null.quantile(0.999)[0]
    z = torch.maximum(neurons.positive.z[..., 0], neurons.negative.z[..., 0])
    assert len(hits) == neurons.n_specialised() == int((z > bar).sum())
    assert [hit.z for hit in hits] == sorted((hit.z for hit in hits), reverse=True)
    assert len({hit.neuron for hit in hits}) == len(hits), "a neuron comes once"
    assert len(neurons.specialised(n=10**6, quantile=0.5)) > len(hits)


def test_the_null_of_structureless_directions_calls_few_specialised(W_U):
    directions = torch.randn(4000, D, generator=torch.Generator().manual_seed(2))
    plain = decode_directions(directions, W_U, k=1)
    poles = torch.stack([plain.positive.z[0, :, 0], plain.negative.z[0, :, 0]])
    assert 0.0002 < float((poles > plain.null.quantile(0.999)).float().mean()) < 0.004


def test_a_null_quantile_needs_draws():
    null = Null(torch.arange(100.0)[None], torch.arange(100.0)[None])
    assert null.quantile(0.5)[0] == pytest.approx(49.5)
    with pytest.raises(ValueError, match="100 draws"):
        null.quantile(0.999)
    with pytest.raises(ValueError, match="kurtosis"):
        null.quantile(0.5, of="norm")


def test_tracked_tokens_are_kept_for_every_neuron(neurons, W_U):
    assert list(neurons.tracked) == [" w9", " w3"]
    for hit in neurons.find(" w9", n=1000, pole="positive"):
        assert neurons.tracked[" w9"][0, hit.neuron.index] == pytest.approx(hit.logit, abs=1e-5)
        assert neurons.tracked_probs(9)[0, hit.neuron.index] == pytest.approx(hit.prob, rel=1e-4)
    with pytest.raises(KeyError, match="not tracked"):
        neurons.tracked[" w4"]


def test_one_neuron(neurons):
    one = neurons[0, 5]
    assert neurons["L0N5"] == one == neurons[Neuron(0, 5)]
    assert one.positive[0].token == " w9" and one.specialised
    assert len(one.positive) == len(one.negative) == K
    text = str(one)
    assert "L0N5" in text and "' w9'" in text and "positive pole" in text and "specialised" in text
    assert len(one.to_frame()) == 2 * K


def test_a_neuron_that_is_not_there(neurons):
    for neuron in ("L1N0", (0, N)):
        with pytest.raises(KeyError, match=f"neurons 0 to {N - 1}"):
            neurons[neuron]


def test_a_hostile_vocabulary_is_escaped_in_a_notebook(neurons):
    assert neurons[0, 8].positive[0].token == "<b>\u202ex</b>"
    for shown in (neurons[0, 8], neurons.find(7), neurons):
        html = shown._repr_html_()
        assert "<b>" not in html and "\u202e" not in html and "&lt;b&gt;" in html
    assert "\u202e" not in str(neurons[0, 8])


def test_the_frame_holds_a_row_a_neuron_and_pole(neurons):
    frame = neurons.to_frame()
    assert len(frame) == 2 * N and frame.iloc[10]["neuron"] == "L0N5" and frame.iloc[10]["token"] == " w9"
    assert frame.iloc[11]["pole"] == "negative" and len(frame.iloc[0]["tokens"]) == K
    assert not frame.isna().any(axis=None)


def test_hits_print_slice_and_frame(neurons):
    hits = neurons.find(" w9", n=5)
    assert isinstance(hits[0], Hit) and len(hits[1:3]) == 2 and hits[1:3][0] == hits[1]
    assert "' w9'" in str(hits) and "write_z" in str(hits)
    frame = hits.to_frame()
    assert list(frame.columns) == list(Hit._fields) and frame["neuron"][0] in ("L0N5", "L0N6")
    json.dumps(frame.to_dict("records"))
    assert "none" in str(neurons.find(0, n=1, pole="positive")[:0])
    assert pd.api.types.is_float_dtype(frame["z"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pole": "up"}, "pole: expected"),
        ({"by": "size"}, "by: expected"),
        ({"n": 0}, "n: expected"),
    ],
)
def test_wrong_questions_are_refused(neurons, arguments, message):
    with pytest.raises(ValueError, match=message):
        neurons.find(" w9", **arguments)


def test_cosines_have_no_probabilities(W_U):
    cosines = decode_directions(torch.cat([torch.randn(40, D), W_U.T[3:4]]), W_U, score="cosine", k=2)
    assert float(cosines.positive.logits.max()) <= 1 + 1e-6
    for ask in (
        lambda: cosines.positive.probs,
        lambda: cosines.find(3, by="prob"),
        lambda: cosines.tracked_probs(3),
    ):
        with pytest.raises(ValueError, match='score="dot"'):
            ask()
    assert cosines.find(3)[0].prob != cosines.find(3)[0].prob
    assert "cosine" in str(cosines.find(3)) and "prob" not in str(cosines[0, 0])
    assert cosines.to_frame()["prob"].isna().all()


def test_few_directions_have_no_null(W_U):
    few = decode_directions(torch.randn(3, D), W_U, k=2)
    assert few.null is None and "null" not in repr(few) and "null" not in str(few[0, 0])
    with pytest.raises(ValueError, match="too few to shuffle"):
        few.specialised()


def test_hits_show_themselves_as_a_table(neurons):
    for hits in (neurons.find(3), neurons.specialised(3)):
        assert repr(hits) == str(hits) and "neuron     pole" in repr(hits) and "Hit(" not in repr(hits)


def test_what_few_directions_do_not_need_is_made_when_asked_for(W_U, monkeypatch, tmp_path):
    x, W_U = torch.randn(50, D), W_U.clone()
    monkeypatch.setattr(directions, "_MANY", 0)
    at_once = decode_directions(x, W_U, k=2)
    monkeypatch.undo()
    made = []
    monkeypatch.setattr(directions, "fingerprint", lambda *of: made.append("fingerprint") or fingerprint(*of))
    monkeypatch.setattr(directions, "null_of", lambda draws: made.append("null") or null_of(draws))
    later, held = decode_directions(x, W_U, k=2), x.clone()
    x.mul_(2)
    assert not made and torch.equal(later.positive.ids, at_once.positive.ids)
    assert torch.allclose(later.null.quantile(), at_once.null.quantile(), atol=1e-5)
    assert later.null.kurtosis.shape == at_once.null.kurtosis.shape and made == ["null"]
    later.save(tmp_path / "map.safetensors")
    assert later.source.fingerprint == at_once.source.fingerprint and made == ["null", "fingerprint"]
    assert NeuronMap.load(tmp_path / "map.safetensors").source == later.source
    unasked = decode_directions(held, W_U, k=2)
    with torch.no_grad():
        W_U.add_(1)
    for ask, what in ((lambda: unasked.source.fingerprint, "fingerprint"), (lambda: unasked.null.z, "null")):
        with pytest.raises(ValueError, match=f"{what}: it is made when first asked for, .* was changed since"):
            ask()


def test_the_map_describes_itself(neurons):
    text = repr(neurons)
    for part in ("1 layers x 400 neurons", 'side "direction"', "k=4", "d_vocab=60", "null"):
        assert part in text
    assert len(neurons) == N and neurons.d_vocab == V and neurons.d_mlp == N and neurons.k == K


# Zero directions


@pytest.fixture(scope="module")
def pruned(W_U):
    directions = torch.randn(60, D, generator=torch.Generator().manual_seed(1))
    directions[[0, 7, 59]] = 0
    return decode_directions(directions, W_U, k=K, tokens=[3], tokenizer=Words())


def test_a_zero_direction_is_in_the_map_marked_and_without_a_reading(pruned):
    zero = pruned.zero
    assert zero[0].nonzero().flatten().tolist() == [0, 7, 59] and len(pruned) == 60
    for top in (pruned.positive, pruned.negative):
        assert (top.ids[zero] == -1).all() and (top.strings[zero.numpy()] == "<none>").all()
        for name in ("logits", "log_z", "write_z", "z", "probs"):
            values = getattr(top, name)
            assert values[zero].isnan().all() and not values[~zero].isnan().any(), name
    for values in (pruned.std, pruned.kurtosis, pruned.mean, pruned.tracked[3]):
        assert torch.equal(values.isnan(), zero)
    assert torch.equal(pruned.norm == 0, zero)
    assert "a zero direction, which has no reading" in str(pruned["L0N7"]) and not pruned["L0N7"].specialised
    assert "3 zero directions" in repr(pruned)


@pytest.mark.parametrize("by", ["z", "prob", "write", "coherence"])
def test_a_zero_direction_is_never_found_and_never_specialised(pruned, by):
    zero = {Neuron(0, index) for index in (0, 7, 59)}
    assert not zero & {hit.neuron for hit in pruned.specialised(60, quantile=0.0, by=by)}
    found = [hit for id in range(V) for hit in pruned.find(id, n=1000, by=by)]
    assert len(found) == 2 * 57 * K and not zero & {hit.neuron for hit in found}


def test_a_zero_direction_is_a_row_of_the_frame(pruned):
    frame = pruned.to_frame()
    rows = frame[frame["token_id"] == -1]
    assert len(frame) == 120 and len(rows) == 6 and set(rows["token"]) == {"<none>"}
    assert rows[["logit", "prob", "z", "write_z", "log_z", "std", "kurtosis"]].isna().all(axis=None)


def test_a_layer_of_zeros_has_no_null(W_U):
    neurons = decode_directions(torch.zeros(40, D), W_U, k=K)
    assert neurons.zero.all() and neurons.null.quantile().isnan().all() and neurons.n_specialised() == 0


def test_one_pruned_neuron_and_one_dead_latent_refuse_nothing(bridge):
    model = families.copied(bridge)
    with torch.no_grad():
        model.blocks[1].mlp.W_in[:, 3] = 0
        model.blocks[1].mlp.W_out[5] = 0
    for side, dead in (("in", 3), ("out", 5)):
        whole, neurons = flash_decode(bridge, side=side, k=K), flash_decode(model, side=side, k=K)
        assert neurons.zero.nonzero().tolist() == [[1, dead]]
        alive = ~neurons.zero
        assert torch.equal(neurons.positive.ids[alive], whole.positive.ids[alive])
    assert not torch.isnan(flash_decode(model, side="in").positive.write_z[1, 4]).any()
    assert flash_decode(model, side="in", k=K).positive.write_z[1, 5].isnan().all(), "it writes nothing"
