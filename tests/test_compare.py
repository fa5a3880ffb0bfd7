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
        compare(a, decode_directions(x, W_U[:, 1:], k=5))  # without strings
    with pytest.raises(ValueError, match="same fold_ln"):
        compare(a, dataclasses.replace(a, source=dataclasses.replace(a.source, fold_ln=True)))
    with pytest.raises(ValueError, match="same side"):
        compare(a, dataclasses.replace(a, side="out"))
    others = tuple(f"other {id}" for id in range(V))
    with pytest.raises(ValueError, match="tokens that a has too"):
        compare(a, dataclasses.replace(a, vocab=dataclasses.replace(a.vocab, strings=others)))
    with pytest.raises(TypeError):
        compare(a, "map")


def test_a_saved_map_compares(x, W_U, tmp_path):
    a = decoded(x, W_U)
    a.save(tmp_path / "a.safetensors")
    assert compare(a, NeuronMap.load(tmp_path / "a.safetensors")).agreement == 1


def test_maps_of_other_tokens_are_compared_over_those_of_both(x, W_U):
    """A fine-tune that renamed token 3, moved token 5 behind the others, and added four."""
    names = [f" w{id}" for id in range(V)]
    order = [*range(5), *range(6, V), 5]
    added = torch.randn(D, 4, generator=torch.Generator().manual_seed(3)) * 3
    theirs = [" w3" if id == 3 else names[id] for id in order]
    theirs[3] = "<|im_start|>"
    a = decode_directions(x, W_U, k=2, tokenizer=names)
    b = decode_directions(x, torch.cat([W_U[:, order], added], 1), k=2, tokenizer=[*theirs, "n0", "n1", "n2", "n3"])
    found = compare(a, b)
    assert found.n_tokens == V - 1 and f"over {V - 1} tokens of both" in repr(found)
    same, jaccard = [], []
    for row in range(N):
        one, other = ([t for t in map.positive.strings[0, row] if t in names and t != " w3"] for map in (a, b))
        assert bool(found.compared[0, row]) == bool(one and other)
        same.append(bool(one and other) and one[0] == other[0])
        jaccard.append(len({*one} & {*other}) / len({*one} | {*other}) if one and other else float("nan"))
    assert found.same_top[0].tolist() == same and found.compared.sum() < N
    assert found.overlap[0].tolist() == pytest.approx(jaccard, nan_ok=True)
    assert found.agreement == pytest.approx(sum(same) / int(found.compared.sum()))
    changed = found.changed(N)
    assert not set(changed["token_a"]) & {" w3"} and not set(changed["token_b"]) & {"<|im_start|>", "n0"}
    again = compare(b, a)
    assert again.agreement == found.agreement and again.null == pytest.approx(found.null)


def test_renamed_tokens_alone_change_nothing_else(x, W_U):
    a = decoded(x, W_U)
    renamed = tuple("<|new|>" if id == 9 else string for id, string in enumerate(a.vocab.strings))
    found = compare(a, dataclasses.replace(a, vocab=dataclasses.replace(a.vocab, strings=renamed)))
    assert found.agreement == 1 and found.n_tokens == V - 1


def test_zero_directions_are_not_compared(x, W_U):
    pruned = x.clone()
    pruned[:100] = 0
    found = compare(decoded(pruned, W_U), decoded(x, W_U))
    assert found.agreement == 1 and found.compared.sum() == N - 100 and len(found.changed(N)) == 0
    assert not found.same_top[0, :100].any() and found.overlap[0, :100].isnan().all()
    assert found.by_specialisation(2)["neurons"].sum() == N - 100
    assert found.null == pytest.approx(compare(decoded(x[100:], W_U), decoded(x[100:], W_U)).null)
