import dataclasses

import pytest
import torch

from tests import families
from tl_flash import activation_stats, check_lens, clamp
from tl_flash.clamps import Prompts
from tl_flash.evidence.effects import Vocabulary
from tl_flash.lens import jacobian_lens
from tl_flash.weights import read

PROMPTS = ["a dog", "the cat and a dog ran", "the red house"]
TEXTS = ["the cat", "a red house and a dog ran to the sea", "my friend Tom saw the old cat near the house"]
COLUMNS = ["layer", "dose", "reading", "correlation", "correlation_stderr", "top_raised", "ceiling", "share"]


@pytest.fixture(scope="module")
def lens(bridge):
    return jacobian_lens(bridge, PROMPTS)


@torch.no_grad()
def mean_log_probs(model, text):
    """At positions from 8 on, of a shorter text at the last one."""
    log_probs = model(text).log_softmax(-1)[0]
    return log_probs[min(8, len(log_probs) - 1) :].double().mean(0)


def test_check_lens_measures_one_clamp_at_a_time(bridge, lens):
    frame = check_lens(bridge, lens, TEXTS, n=1, doses=[0.5, 5.0], seed=3)
    assert len(frame) == len(lens.layers) * 2 * 2 and list(frame.columns) == COLUMNS
    generator = torch.Generator().manual_seed(3)
    stats, weights = activation_stats(bridge, TEXTS), read(bridge)
    W_U = weights.W_U.float() * weights.final_gain[:, None]
    rows = [row[None] for row in Prompts.of(bridge, TEXTS).rows]
    for layer in lens.layers:
        index = int(torch.randperm(weights.d_mlp, generator=generator)[0])
        changes = []
        for row in rows:
            before = mean_log_probs(bridge, row)
            with clamp(bridge, {(layer, index): 5.0 * stats[layer, index].std}, positions=range(1, row.shape[1])):
                changes.append(mean_log_probs(bridge, row) - before)
        effect = torch.stack(changes).mean(0)
        x = weights.directions(layer, "out")[[index]]
        for reading, scores in (("plain", x @ W_U), ("lens", lens.carry(x, layer) @ W_U)):
            row = frame.query(f"layer == {layer} and dose == 5 and reading == '{reading}'").iloc[0]
            expected = torch.corrcoef(torch.stack([scores[0].double(), effect]))[0, 1]
            assert row["correlation"] == pytest.approx(float(expected), abs=1e-4)
            assert row["top_raised"] == float(scores[0].argmax() in effect.topk(10).indices)
            assert row["share"] == pytest.approx(row["correlation"] / row["ceiling"])


def test_the_ceiling_is_what_the_truth_itself_would_reach(bridge):
    """Where effects are one truth and noise of each text's own, that truth correlates with the mean so far."""
    vocabulary = Vocabulary.of(read(bridge))
    generator = torch.Generator().manual_seed(0)
    for noise in (0.5, 2.0, 5.0):
        truth = torch.randn(200, 1, 40, generator=generator, dtype=torch.float64)
        effects = truth + noise * torch.randn(200, 24, 40, generator=generator, dtype=torch.float64)
        reached = vocabulary.correlation(truth[:, 0], effects.mean(1)).mean()
        assert float(vocabulary.ceiling(effects).mean()) == pytest.approx(float(reached), abs=0.02)
    assert vocabulary.ceiling(effects[:, :1]).isnan().all()


def test_a_correlation_over_the_vocabulary_is_that_of_the_logits(bridge):
    weights = read(bridge)
    vocabulary = Vocabulary.of(weights)
    a, b = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W_U = weights.W_U.double() * weights.final_gain[:, None].double()
    expected = torch.corrcoef(torch.stack([a @ W_U, b @ W_U]))[0, 1]
    assert float(vocabulary.correlation(a, b)) == pytest.approx(float(expected), abs=1e-5)


def test_an_exact_lens_predicts_small_effects_on_its_own_prompt(bridge):
    tokens = bridge.to_tokens("the cat and a dog ran")
    lens = jacobian_lens(bridge, tokens, method="exact", freeze_attention=False)
    frame = check_lens(bridge, lens, tokens, n=8, doses=[0.01], mode="add")
    correlation = frame.set_index(["reading", "layer"])["correlation"]
    assert (correlation["lens"] > 0.99).all()
    assert correlation["plain"].loc[0] < correlation["lens"].loc[0]


def test_several_lenses_are_checked_on_the_same_effects(bridge, lens):
    other = jacobian_lens(bridge, TEXTS, method="exact")
    frame = check_lens(bridge, {"one": lens, "other": other}, TEXTS, n=3, doses=[5.0], layers=[1])
    assert list(frame["reading"]) == ["plain", "one", "other"] and set(frame["layer"]) == {1}
    alone = check_lens(bridge, other, TEXTS, n=3, doses=[5.0], layers=[1])
    assert alone["correlation"].iloc[1] == pytest.approx(frame["correlation"].iloc[2])


def test_batches_do_not_matter(bridge, lens):
    one, all_at_once = (check_lens(bridge, lens, TEXTS, n=2, doses=[5.0], batch_size=size) for size in (1, None))
    assert one["correlation"].tolist() == pytest.approx(all_at_once["correlation"].tolist(), abs=1e-5)


def test_check_lens_refuses(bridge, lens):
    with pytest.raises(ValueError, match="n: expected 1 to"):
        check_lens(bridge, lens, PROMPTS, n=10**6)
    with pytest.raises(ValueError, match="doses: expected at least one"):
        check_lens(bridge, lens, PROMPTS, n=2, doses=[])
    for dose in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0 and finite"):
            check_lens(bridge, lens, PROMPTS, n=2, doses=[dose])
    with pytest.raises(ValueError, match='mode: expected "set" or "add"'):
        check_lens(bridge, lens, PROMPTS, n=2, mode="multiply")
    with pytest.raises(TypeError, match="expected a JacobianLens"):
        check_lens(bridge, lens.J, PROMPTS, n=2)
    with pytest.raises(ValueError, match="lens: expected at least one"):
        check_lens(bridge, {}, PROMPTS, n=2)
    with pytest.raises(ValueError, match="it holds layers"):
        check_lens(bridge, jacobian_lens(bridge, PROMPTS, layers=[0]), PROMPTS, n=2, layers=[1])
    with pytest.raises(ValueError, match="layers from 0 to 1, got 7"):
        check_lens(bridge, lens, PROMPTS, n=2, layers=[7])
    with pytest.raises(ValueError, match="each layer once"):
        check_lens(bridge, lens, PROMPTS, n=2, layers=[1, 1])
    with pytest.raises(ValueError, match='"plain" is the reading without a lens'):
        check_lens(bridge, {"plain": lens}, PROMPTS, n=2)
    with pytest.raises(ValueError, match="batch_size"):
        check_lens(bridge, lens, PROMPTS, n=2, batch_size=0)
    with pytest.raises(ValueError, match="layers: expected at least one"):
        check_lens(bridge, lens, PROMPTS, n=2, layers=[])
    with pytest.raises(ValueError, match="at least two tokens each"):
        check_lens(bridge, lens, bridge.to_tokens("a dog")[:, -1:], n=2)
    with pytest.raises(ValueError, match="no neuron drawn in layer . ever changes on them"):
        check_lens(bridge, lens, bridge.to_tokens("a dog")[:, :2], n=2)
    other = dataclasses.replace(lens, signature=lens.signature + 1)
    with pytest.raises(ValueError, match="another model"):
        check_lens(bridge, other, PROMPTS, n=2)


def test_a_silent_neuron_is_named_and_left_out(bridge):
    pruned = families.copied(bridge)
    with torch.no_grad():
        pruned.blocks[1].mlp.W_in[:, 3] = 0
    lens = jacobian_lens(pruned, PROMPTS)
    frame = check_lens(pruned, lens, PROMPTS, n=52, doses=[1.0], layers=[1])
    assert frame.attrs["silent"] == ("L1N3",) and frame["correlation"].notna().all()
    assert check_lens(bridge, jacobian_lens(bridge, PROMPTS), PROMPTS, n=2, doses=[1.0]).attrs["silent"] == ()
