import dataclasses

import pytest
import torch

from tests.test_neuron_map import Words
from tl_flash import compare, decode_directions
from tl_flash.maps import NeuronMap

V, D, N = 60, 16, 300


@pytest.fixture(scope="module")
def W_U():
    return torch.randn(D, V, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def x():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def decoded(x, W_U, **options):
    return decode_directions(x, W_U, tokenizer=Words(), **({"k": 5} | options))


@pytest.fixture(scope="module")
def comparison(x, W_U):
    noise = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    return compare(decoded(x, W_U), decoded(x + 0.5 * noise, W_U))


def test_agreement_counts_neurons(comparison):
    a, b = (map.positive.ids[0].tolist() for map in (comparison.a, comparison.b))
    same = [one[0] == other[0] for one, other in zip(a, b, strict=True)]
    assert comparison.agreement == pytest.approx(sum(same) / N) and 0.2 < comparison.agreement < 0.9
    assert comparison.same_top[0].tolist() == same
    jaccard = [len({*one} & {*other}) / len({*one} | {*other}) for one, other in zip(a, b, strict=True)]
    assert comparison.overlap[0].tolist() == pytest.approx(jaccard)


def test_the_null_is_the_mean_over_shuffles(comparison):
    top_a, top_b = comparison.a.positive.ids[0, :, 0], comparison.b.positive.ids[0, :, 0]
    shuffles = [float((top_a == top_b[torch.randperm(N)]).float().mean()) for _ in range(2000)]
    assert comparison.null == pytest.approx(sum(shuffles) / 2000, abs=0.002)


def test_a_map_agrees_with_itself(x, W_U):
    same = compare(decoded(x, W_U), decoded(x, W_U))
    assert same.agreement == 1 and float(same.overlap.min()) == 1 and len(same.changed()) == 0
    assert same.null < 0.2


def test_the_surest_neurons_keep_their_token(comparison):
    parts = comparison.by_specialisation(3)
    assert parts["neurons"].sum() == N and list(parts["z_from"]) == sorted(parts["z_from"])
    assert parts["agreement"].iloc[-1] > parts["agreement"].iloc[0]
    with pytest.raises(ValueError, match="parts"):
        comparison.by_specialisation(0)


def test_changed_neurons_come_surest_first(comparison):
    changed = comparison.changed(1000)
    assert len(changed) == int((~comparison.same_top).sum())
    assert (changed["token_a"] != changed["token_b"]).all()
    surest = changed[["z_a", "z_b"]].max(axis=1)
    assert list(surest) == sorted(surest, reverse=True)
    assert len(comparison.changed(3)) == 3
    with pytest.raises(ValueError, match="n: expected"):
        comparison.changed(0)


def test_it_prints(comparison):
    assert f"{comparison.agreement:.1%}" in repr(comparison) and "null" in str(comparison)
    assert "<table" in comparison._repr_html_()


@pytest.mark.parametrize(
    ("options", "what"),
    [({"k": 4}, "k"), ({"score": "cosine"}, "score")],
)
def test_maps_made_otherwise_are_refused(x, W_U, options, what):
    with pytest.raises(ValueError, match=f"same {what} as a"):
        compare(decoded(x, W_U), decoded(x, W_U, **options))


def test_maps_of_other_shape_side_or_vocabulary_are_refused(x, W_U):
    a = decoded(x, W_U)
    with pytest.raises(ValueError, match="same d_mlp"):
        compare(a, decoded(x[1:], W_U))
    with pytest.raises(ValueError, match="same d_vocab"):
        compare(a, decode_directions(x, W_U[:, 1:], k=5))
    with pytest.raises(ValueError, match="same fold_ln"):
        compare(a, dataclasses.replace(a, source=dataclasses.replace(a.source, fold_ln=True)))
    with pytest.raises(ValueError, match="same side"):
        compare(a, dataclasses.replace(a, side="out"))
    strings = ["other", *a.vocab.strings[1:]]
    with pytest.raises(ValueError, match="token 0: ' w0' in a, 'other' in b"):
        compare(a, dataclasses.replace(a, vocab=dataclasses.replace(a.vocab, strings=tuple(strings))))
    with pytest.raises(TypeError):
        compare(a, "map")


def test_a_saved_map_compares(x, W_U, tmp_path):
    a = decoded(x, W_U)
    a.save(tmp_path / "a.safetensors")
    assert compare(a, NeuronMap.load(tmp_path / "a.safetensors")).agreement == 1
