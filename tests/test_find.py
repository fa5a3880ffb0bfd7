"""Which neurons are about a concept: against float64, against the nulls, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm, t, uniform

from tests import families
from tl_flash import (
    Neuron,
    activation_stats,
    clamp,
    concepts,
    find_neurons,
    flash_decode,
    jacobian_lens,
)
from tl_flash.maps.concept_null import two_sided
from tl_flash.weights import read

FORMS = [" dog", " cat"]


def test_weights_that_were_read_are_searched_as_their_model_is(bridge):
    weights = read(bridge)
    assert read(weights) is weights
    once, again = (find_neurons(each, "dog", n=9) for each in (bridge, weights))
    assert once.hits == again.hits and once.tokens == again.tokens


def truth(name, side, ids, weights=None):
    """Mean z of some tokens in every neuron, from the float64 model alone: [layer * neuron]."""
    W_U = families.unembedding(name)
    scores = torch.cat([families.direction(name, layer, side) for layer in range(families.N_LAYERS)]) @ W_U
    z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)
    weights = torch.ones(len(ids)) if weights is None else torch.tensor(weights)
    return z[:, ids] @ (weights / weights.sum()).double()


@pytest.mark.parametrize("surface", ["hf", "bridge"])
@pytest.mark.parametrize("name", families.DENSE)
def test_scores_are_those_of_a_float64_scan(name, surface):
    model, tokenizer = families.build(name, surface), families.tokenizer()
    table = concepts(model, {"pets": dict(zip(FORMS, [1.0, 0.5], strict=True))}, tokenizer=tokenizer)
    ids = [table.vocab.id(token) for token in FORMS]
    for at, side in enumerate(families.sides(name)):
        torch.testing.assert_close(table.z[0, at].double(), truth(name, side, ids, [1.0, 0.5]), atol=2e-5, rtol=2e-5)
    assert table.readings[-1] == "out"


def test_hits_are_the_best_of_all_sides_and_say_what_raises_the_concept(bridge):
    table = concepts(bridge, {"pets": dict.fromkeys(FORMS, 1.0)})
    hits = table.hits("pets", n=1000)
    assert len(hits) == 3 * families.N_LAYERS * families.D_MLP
    z = {side: truth("llama", side, table.ids[0]) for side in table.sides}
    for hit in hits:
        row = hit.neuron.layer * families.D_MLP + hit.neuron.index
        assert hit.z == pytest.approx(float(z[hit.side][row]), abs=2e-5)
        assert hit.sign == math.copysign(1, z["out"][row]) == math.copysign(1, hit.write_z)
        if hit.side == "out":
            assert hit.z == hit.write_z
    assert [abs(hit.z) for hit in hits] == sorted((abs(hit.z) for hit in hits), reverse=True)
    one = table.hits("pets", n=3, side="gate", pole=-1)
    assert [hit.side for hit in one] == ["gate"] * 3 and all(hit.z < 0 for hit in one)


def test_breadth_and_token_say_what_carries_a_hit(bridge):
    hits = find_neurons(bridge, "pets", tokens=FORMS, side="out", n=1000)
    single = [truth("llama", "out", [hits.table.vocab.id(token)]) for token in FORMS]
    for hit in hits:
        row = hit.neuron.layer * families.D_MLP + hit.neuron.index
        parts = torch.stack([z[row] for z in single])
        assert hit.breadth == pytest.approx(float(parts.sum() ** 2 / parts.square().sum()), rel=2e-3, abs=1e-3)
        assert hit.token == FORMS[int((parts * math.copysign(1, hit.z)).argmax())]


def test_coherence_is_the_smaller_of_reading_and_writing(bridge):
    table = concepts(bridge, ["dog"])
    hits = table.hits("dog", n=1000, by="coherence")
    assert {hit.side for hit in hits} == {"in", "gate"}
    keys = [min(abs(hit.z), abs(hit.write_z)) for hit in hits]
    assert keys == sorted(keys, reverse=True)
    alone = {side: table.p_values("dog", side)[0, 0] for side in table.sides}
    for hit in hits[:20]:
        row = hit.neuron.layer * families.D_MLP + hit.neuron.index
        assert hit.p_value == max(alone[hit.side][row], alone["out"][row])


def test_the_lens_is_a_reading_of_its_own(bridge):
    lens = jacobian_lens(bridge, ["the dog saw a cat"])
    table = concepts(bridge, ["dog"], lens=lens)
    assert table.sides == ("in", "gate", "out", "lens") and table.readings[-1] == "lens"
    x = torch.cat([lens.carry(read(bridge).directions(layer, "out"), layer) for layer in range(2)]).double()
    scores = x @ families.unembedding("llama")
    z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)
    expected = z[:, list(table.ids[0])].mean(1)
    torch.testing.assert_close(table.z[0, 3].double(), expected, atol=1e-4, rtol=1e-4)
    hits = find_neurons(bridge, "dog", side="in", lens=lens, n=5)
    assert [hit.sign for hit in hits] == [
        int(math.copysign(1, expected[hit.neuron.layer * families.D_MLP + hit.neuron.index])) for hit in hits
    ]


def test_one_pass_for_many_concepts_gives_what_each_alone_gives(bridge):
    words = ["dog", "cat", "sea"]
    table = concepts(bridge, words, sides=["in", "out"])
    for at, word in enumerate(words):
        alone = find_neurons(bridge, word, sides=["in", "out"], n=7)
        assert [(hit.neuron, hit.side) for hit in table.hits(word, 7)] == [(hit.neuron, hit.side) for hit in alone]
        torch.testing.assert_close(alone.table.z[0], table.z[at])
    frame = table.to_frame()
    assert len(frame) == 2 * table.z.shape[2] and list(frame)[3:] == words
    assert frame.loc[frame["neuron"].eq("L1N3") & frame["side"].eq("out"), "cat"].item() == float(
        table.z[1, 1, families.D_MLP + 3]
    )


def test_an_edited_set_is_taken_back(bridge):
    hits = find_neurons(bridge, "dog", n=3)
    assert find_neurons(bridge, "dog", tokens=hits.tokens, n=3).to_frame().equals(hits.to_frame())
    edited = find_neurons(bridge, "dog", tokens=hits.tokens | {" cat": 0.5}, n=3)
    assert edited.tokens == hits.tokens | {" cat": 0.5} and "' cat' x 0.5" in str(edited)


def test_related_tokens_are_the_nearest_columns(bridge):
    hits = find_neurons(bridge, "dog", related=2)
    W = families.unembedding("llama")
    W = torch.nn.functional.normalize(W - W.mean(1, keepdim=True), dim=0)
    own = hits.table.vocab.ids(list(find_neurons(bridge, "dog").tokens))
    cosines = torch.nn.functional.normalize(W[:, own].sum(1), dim=0) @ W
    cosines[[*own, *range(families.N_TOKENS, families.D_VOCAB)]] = -1
    values, ids = (each.tolist() for each in cosines.topk(2))
    nearest = dict(zip(map(hits.table.vocab.string, ids), values, strict=True))
    assert {token: weight for token, weight in hits.tokens.items() if weight != 1} == pytest.approx(nearest, abs=1e-3)


def test_a_checkpoint_and_blocks_of_any_size_give_the_same(monkeypatch):
    from tl_flash import demo
    from tl_flash.decode import scan

    words = ["dog", "California"]
    held, read_in_parts = concepts(demo.load("base"), words), concepts(demo.path("base"), words)
    monkeypatch.setattr(scan, "BLOCK", 300)
    small = concepts(demo.path("base"), words)
    for other in (read_in_parts, small):
        torch.testing.assert_close(other.z, held.z, atol=1e-5, rtol=1e-5)
        for word in words:
            np.testing.assert_allclose(other.p_values(word), held.p_values(word), rtol=1e-3)
            assert other[word][0].neuron == held[word][0].neuron
    with pytest.raises(ValueError, match="at least 16 of the vocabulary"):
        names = [name for name in held.vocab.strings if name is not None]
        find_neurons(demo.path("base"), "all", tokens=list(range(len(names) - 10)))


# Statistics


@pytest.mark.parametrize(
    ("kurtosis", "null"), [(0.0, norm()), (1.5, t(8, scale=(6 / 8) ** 0.5)), (-1.2, uniform(-(3**0.5), 2 * 3**0.5))]
)
def test_tails_are_pearsons(kurtosis, null):
    u = torch.linspace(-1.7, 1.7, 35)
    found = two_sided(u, torch.full_like(u, kurtosis))
    expected = 2 * null.sf(u.abs().numpy())
    near = u.abs().numpy() < (1.2 if kurtosis < 0 else 2)  # beyond its shoulders no tail is below the normal's
    assert found[near] == pytest.approx(expected[near], rel=1e-3)
    far = torch.tensor([4.0, 8.0])
    assert (two_sided(far, torch.full_like(far, kurtosis)) >= 0.999 * 2 * norm.sf(far.numpy())).all()


def wide(planted=0, strength=0.0, seed=0):
    """A Llama of 2 x 1,500 neurons; the first `planted` W_out rows of layer 0 lean to " dog"."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=families.D_VOCAB, hidden_size=64, intermediate_size=1500, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    vocab = read(model, tokenizer=families.tokenizer()).vocab
    with torch.no_grad():
        W_U = model.lm_head.weight
        W_U.normal_()
        dog = W_U[vocab.id(" dog")] - W_U.mean(0)
        rows = model.model.layers[0].mlp.down_proj.weight.T  # [neuron, d_model], a view
        rows[:planted] += strength * rows.norm(dim=1).mean() * dog / dog.norm()
    return model


@pytest.mark.parametrize("sides", [["in"], ["gate", "out"]])
def test_p_values_are_uniform_on_shuffled_weights(sides):
    model = wide(seed=3)
    for layer in model.model.layers:  # trained or not: each coordinate in an order of its own
        for matrix in (
            layer.mlp.up_proj.weight.data,
            layer.mlp.gate_proj.weight.data,
            layer.mlp.down_proj.weight.data.T,
        ):
            matrix *= torch.linspace(0.2, 3.0, matrix.shape[1]) ** 2
            matrix += torch.linspace(-0.02, 0.02, matrix.shape[1])
            matrix.copy_(matrix.gather(0, torch.rand(matrix.shape).argsort(0)))
    for tokens in ([" dog"], [" dog", " cat", " sea"]):
        table = find_neurons(model, "some", tokens=tokens, sides=sides, tokenizer=families.tokenizer()).table
        for p in table.p_values("some")[0]:
            assert kstest(p, "uniform").pvalue > 0.01
            assert abs((p < 0.01).mean() - 0.01) < 0.006


def test_that_the_test_above_can_fail():
    model = wide(planted=300, strength=0.5)
    table = find_neurons(model, "dog", tokens=[" dog"], side="out", tokenizer=families.tokenizer()).table
    assert kstest(table.p_values("dog")[0, 0, :300], "uniform").pvalue < 1e-9


def test_q_controls_the_false_discovery_rate_and_finds_what_was_planted():
    false, found = [], []
    for seed in range(12):
        model = wide(planted=60, strength=0.9, seed=seed)
        table = find_neurons(model, "dog", tokens=[" dog"], sides=["in", "out"], tokenizer=families.tokenizer()).table
        named = table.q_values("dog") <= 0.1
        planted = np.zeros_like(named)
        planted[1, :60] = True
        false.append((named & ~planted).sum() / max(1, named.sum()))
        found.append((named & planted).sum() / 60)
    assert np.mean(false) < 0.1 and np.mean(found) > 0.5


def scaled(d_vocab=2_000):
    """A Llama of 400 neurons whose columns of W_U are of many lengths; and its tokens, the longest columns first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=d_vocab, hidden_size=64, intermediate_size=400, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_().mul_(torch.linspace(0.3, 3.0, d_vocab)[torch.randperm(d_vocab), None])
    return model, model.lm_head.weight.norm(dim=1).argsort(descending=True)


@pytest.mark.parametrize("share", [slice(0, 200), slice(900, 1100), slice(1800, 2000)])
def test_p_values_against_tokens_are_uniform_for_random_tokens_of_any_length(share):
    model, by_length = scaled()
    some = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:96]  # the others are there to compare with
    drawn = by_length[share][some].reshape(24, 4).tolist()
    table = concepts(model, {str(at): dict.fromkeys(ids, 1.0) for at, ids in enumerate(drawn)}, sides=["in"])
    p = np.stack([table.p_values(name)[1] for name in table.names])
    assert kstest(p.flatten(), "uniform").statistic < 0.03, "with tokens of any length it would be 0.1 and more"
    assert abs((p < 0.01).mean() - 0.01) < 0.005


def test_a_neuron_of_many_hot_tokens_is_told_from_one_of_the_concept():
    model, by_length = scaled()
    hot, concept = by_length[:200:4].tolist(), by_length[100:104].tolist()
    W = model.lm_head.weight.data - model.lm_head.weight.data.mean(0)
    with torch.no_grad():
        rows = model.model.layers[0].mlp.down_proj.weight.T
        rows[0] = W[concept].sum(0)  # of the concept alone
        rows[1] = W[concept[0]]  # of one of its tokens
        rows[2] = W[hot[:12]].sum(0)  # of others
    hits = find_neurons(model, "four", tokens=concept, side="out", n=400)
    found = {hit.neuron.index: hit for hit in hits}
    assert hits[0].neuron.index == 0 and hits[0].q_value < 0.01 and hits[0].breadth > 3
    assert found[1].breadth < 2 and found[1].token == f"<{concept[0]}>"
    assert found[1].p_tokens > found[0].p_tokens
    for hit in hits[:50]:
        assert hit.q_value >= max(hit.p_value, hit.p_tokens)


# Clamps


def test_clamps_have_the_signs_and_each_neurons_own_range(bridge):
    hits = find_neurons(bridge, "dog", n=8)
    stats = activation_stats(bridge, ["the dog saw a cat"])
    values = hits.clamps(2.0, stats)
    assert list(values) == list(dict.fromkeys(hit.neuron for hit in hits))
    for hit in hits:
        assert values[hit.neuron] == pytest.approx(2 * hit.sign * stats[hit.neuron].abs_max)
    assert list(hits[:2].clamps(1.0, stats)) == list(dict.fromkeys(hit.neuron for hit in hits[:2]))
    tokens = bridge.to_tokens("the cat")
    plain = bridge(tokens)
    with clamp(bridge, values):
        assert not torch.equal(bridge(tokens), plain)


def test_neurons_that_never_fire_are_not_clamped(bridge):
    class Quiet:
        def abs_max_of(self, neuron):
            return 0.0

    hits = find_neurons(bridge, "dog", n=1)
    with pytest.raises(ValueError, match="is 0 on all texts"):
        hits.clamps(1.0, Quiet())
    with pytest.raises(ValueError, match="nothing to clamp"):
        hits[:0].clamps(1.0, Quiet())


def test_experts_are_found_by_name():
    hits = find_neurons(families.build("mixtral", "hf"), "dog", n=4, tokenizer=families.tokenizer())
    assert all(len(hit.neuron) == 3 for hit in hits)
    with pytest.raises(ValueError, match="mixture of experts"):
        hits.clamps(1.0, type("Stats", (), {"abs_max_of": lambda self, neuron: 1.0})())


def test_a_dead_neuron_is_never_found():
    model = families.copied(families.build("llama", "hf"))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 7] = 0
    hits = find_neurons(model, "dog", side="out", n=1000, tokenizer=families.tokenizer())
    assert len(hits) == 2 * families.D_MLP - 1 and Neuron(0, 7) not in [hit.neuron for hit in hits]
    assert hits.table.z[0, 0].isnan().sum() == 1 and not np.isnan([hit.q_value for hit in hits]).any()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"concept": " "}, ValueError, "concept: expected a word"),
        ({"concept": "xyzzy"}, ValueError, "no token spells 'xyzzy'"),
        ({"concept": ["dog", "xyzzy"]}, ValueError, "no token spells 'xyzzy'"),
        ({"concept": 5}, TypeError, "a word, a phrase or a list of them, got 5"),
        ({"concept": "dog", "tokens": [" hippo"]}, ValueError, "token ' hippo'"),
        ({"concept": "dog", "tokens": []}, ValueError, "at least one token"),
        ({"concept": "dog", "n": 0}, ValueError, "n: expected a whole number, 1 or more, got 0"),
        ({"concept": "dog", "related": -1}, ValueError, "related: expected"),
        ({"concept": "dog", "side": "up"}, ValueError, 'side: expected "in"'),
        ({"concept": "dog", "side": "lens"}, ValueError, "give lens="),
        ({"concept": "dog", "side": "in", "sides": ["in"]}, ValueError, "expected it or sides"),
        ({"concept": "dog", "sides": []}, ValueError, "at least one side"),
        ({"concept": "dog", "sides": "in"}, TypeError, "write side='in'"),
        ({"concept": "dog", "related": 2, "tokens": [" dog"]}, ValueError, "related: expected it or tokens"),
        ({"concept": "dog", "lens": 5}, TypeError, "lens: expected a JacobianLens"),
        ({"concept": "dog", "sides": 5}, TypeError, "sides: expected a list of texts"),
        ({"concept": "dog", "layers": 1}, TypeError, "layers: expected a list of whole numbers"),
        ({"concept": "dog", "tokens": 5}, TypeError, "expected a list of strings or ids"),
        ({"concept": "dog", "tokens": {" dog": 1.0, " cat": 1e-320}}, ValueError, "leave that token out"),
        ({"concept": "dog", "by": "size"}, ValueError, "by: expected one of"),
        ({"concept": "dog", "side": "out", "by": "coherence"}, ValueError, "asks what a neuron reads"),
        ({"concept": "dog", "layers": [9]}, ValueError, "layers: expected"),
    ],
)
def test_refusals(bridge, given, error, message):
    with pytest.raises(error, match=message):
        find_neurons(bridge, **given)


@pytest.mark.parametrize("weight", [1e308, 1e-320])
def test_weights_of_any_size_are_relative(bridge, weight):
    hits = find_neurons(bridge, "pets", tokens=dict.fromkeys(FORMS, weight), n=5)
    assert [hit.z for hit in hits] == [hit.z for hit in find_neurons(bridge, "pets", tokens=FORMS, n=5)]


def test_pruned_neurons_take_no_place_and_no_p_value_from_the_others():
    model = families.copied(families.build("llama", "hf"))
    with torch.no_grad():
        down = model.model.layers[0].mlp.down_proj.weight
        down[:, 4:] = 0
        model.model.layers[1].mlp.down_proj.weight.zero_()
    table = concepts(model, {"pets": dict.fromkeys(FORMS, 1.0)}, tokenizer=families.tokenizer())
    assert {hit.neuron.index for hit in table.hits("pets", n=50, by="coherence")} == set(range(4))
    alive = [hit for hit in table.hits("pets", n=1000, side="out")]
    assert len(alive) == 4 and not any(math.isnan(hit.p_value) for hit in alive)
    assert table.by_layer("out")[0].isnan().tolist() == [[False, True] + [False] * (families.N_LAYERS - 2)]
    writeless = table.hits("pets", n=1000, side="in")
    with pytest.raises(ValueError, match="writes nothing along 'pets'"):
        writeless.clamps(1.0, _Stats())


class _Stats:
    def abs_max_of(self, neuron):
        return 1.0


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("dog", TypeError, r"write \['dog'\]"),
        ([], ValueError, "at least one concept"),
        (5, TypeError, "a list of texts, or a mapping by their names, got 5"),
        (["dog", 5], TypeError, "a list of texts, or a mapping by their names"),
        (["dog", "cat", "dog"], ValueError, "'dog' again"),
        ({"pets": {}}, ValueError, "at least one token"),
    ],
)
def test_refusals_of_several(bridge, words, error, message):
    with pytest.raises(error, match=message):
        concepts(bridge, words)


def test_a_concept_that_a_table_does_not_have(bridge):
    with pytest.raises(KeyError, match="this table has 'dog'"):
        concepts(bridge, ["dog"])["cat"]


def test_a_map_says_where_a_full_search_would_find_more(bridge):
    neurons = flash_decode(bridge, k=1)
    assert "find_neurons scores all 104 neurons" in str(neurons.find(" dog", n=100))
    assert "find_neurons" not in flash_decode(bridge, k=50).find(" dog", n=3).title


def test_the_best_of_each_concept_are_its_hits(bridge):
    table = concepts(bridge, {"dog": " dog", "cat": " cat"})
    for by in ("z", "p", "coherence"):
        best = table.best(2, by=by)
        for name in table.names:
            for side in best["side"].unique():
                rows = best[(best["concept"] == name) & (best["side"] == side)].drop(columns="concept")
                assert rows.to_dict("records") == table.hits(name, 2, side=side, by=by).to_frame().to_dict("records")
    with pytest.raises(ValueError, match="by: expected one of"):
        table.best(by="prob")
