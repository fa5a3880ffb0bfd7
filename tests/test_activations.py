"""Statistics of hook_post equal those of all activations held at once, on every surface."""

import pytest
import torch

from tests import families
from tl_flash.clamps import activation_stats, attached, clamp, run_to

PROMPTS = ["the dog saw a cat", "the cat ran to the old red house", "the sea", "my dear friend Tom saw a dog"]


@pytest.fixture(scope="module", params=[surface for surface in families.surfaces() if surface != "hf"])
def model(request):
    return families.build("llama", request.param)


def held_at_once(model, rows, keep=lambda row: row[1:]):
    """Every activation, float64 [layer, position, neuron], each prompt run alone."""
    layers = []
    for layer in range(2):
        name = f"blocks.{layer}.mlp.hook_post"
        each = [keep(model.run_with_cache(row[None], names_filter=name)[1][name][0]) for row in rows]
        layers.append(torch.cat(each))
    return torch.stack(layers).detach().double()


@pytest.fixture(scope="module")
def rows(model):
    return [model.to_tokens(prompt)[0] for prompt in PROMPTS]


def same(stats, acts):
    assert stats.count == acts.shape[1]
    expected = {
        "mean": acts.mean(1),
        "std": acts.std(1, correction=0),
        "min": acts.amin(1),
        "max": acts.amax(1),
        "abs_max": acts.abs().amax(1),
    }
    for name, value in expected.items():
        got = getattr(stats, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), value, atol=1e-6, rtol=1e-5)
    levels = torch.tensor(stats.levels, dtype=torch.float64)
    torch.testing.assert_close(stats.quantiles.double(), acts.quantile(levels, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equal_all_activations_held_at_once(model, rows, batch_size):
    same(activation_stats(model, PROMPTS * 2, batch_size=batch_size), held_at_once(model, rows * 2))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_the_beginning_of_sequence_and_positions(model, rows):
    assert all(row[0] == model.tokenizer.bos_token_id for row in rows)
    same(activation_stats(model, PROMPTS, include_bos=True), held_at_once(model, rows, lambda row: row))
    same(activation_stats(model, PROMPTS, positions="last"), held_at_once(model, rows, lambda row: row[-1:]))
    same(activation_stats(model, PROMPTS, positions=[0, 2]), held_at_once(model, rows, lambda row: row[2:3]))


def test_tokens_in_any_shape(model, rows):
    expected = activation_stats(model, PROMPTS)
    for tokens in (rows, [row[None] for row in rows]):
        assert torch.equal(activation_stats(model, tokens).mean, expected.mean)
    grid = torch.stack([rows[0], rows[0].flip(0)])
    same(activation_stats(model, grid, include_bos=True), held_at_once(model, grid, lambda row: row))


def test_many_positions_are_sampled(model, rows):
    """A seeded draw of positions, without replacement; the moments stay exact."""
    tokens = torch.randint(2, 70, (40, 30), generator=torch.Generator().manual_seed(0))
    acts = held_at_once(model, tokens, lambda row: row)
    one, again, other = (activation_stats(model, tokens, sample=400, seed=seed) for seed in (1, 1, 2))
    assert (one.count, one.sampled) == (1200, 400)
    assert torch.equal(one.quantiles, again.quantiles) and not torch.equal(one.quantiles, other.quantiles)
    torch.testing.assert_close(one.mean.double(), acts.mean(1), atol=1e-6, rtol=1e-5)
    # The share of all activations below the sampled median: 0.5 within 5 standard errors.
    below = (acts < one.quantiles[one.levels.index(0.5)][:, None]).double().mean(1)
    assert (below - 0.5).abs().max() < 5 * 0.5 / 400**0.5


def test_one_layer_and_one_neuron(model):
    every, second = activation_stats(model, PROMPTS), activation_stats(model, PROMPTS, layers=[1])
    assert second.mean.shape == (1, 52) and torch.equal(second.mean[0], every.mean[1])
    one = second["L1N7"]
    assert one.max == second.max[0, 7] and one.abs_max == second.abs_max_of((1, 7)) == max(one.max, -one.min)
    assert list(one.quantiles) == [0.01, 0.1, 0.5, 0.9, 0.99]
    with pytest.raises(KeyError, match=r"measured were layers \(1,\)"):
        second["L0N7"]


def test_a_frame_has_a_row_a_neuron(model):
    stats = activation_stats(model, PROMPTS, quantiles=[0.5])
    frame = stats.to_frame()
    assert list(frame) == ["neuron", "layer", "index", "mean", "std", "min", "max", "abs_max", "q0.5"]
    row = frame[frame.neuron == "L1N7"].iloc[0]
    assert len(frame) == 104 and row["max"] == stats.max[1, 7].item() and row["q0.5"] == stats.quantiles[0, 1, 7].item()


def test_under_a_clamp_the_clamped_model_is_measured(model):
    with clamp(model, {"L0N3": 4.0}):
        stats = activation_stats(model, PROMPTS)
    assert stats["L0N3"][:3] == (4.0, 0.0, 4.0)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, ValueError, "prompts: expected at least one"),
        ("the dog", {}, TypeError, "prompts: expected a list"),
        (torch.zeros(1, 65, dtype=torch.long), {}, ValueError, "n_ctx = 64 tokens, got one of 65"),
        (torch.zeros(2, 0, dtype=torch.long), {}, ValueError, "prompts: expected at least one, none of them empty"),
        ([""], {}, ValueError, "nothing to measure but beginning-of-sequence"),
        (PROMPTS, {"quantiles": [1.5]}, ValueError, "quantiles: expected levels"),
        (PROMPTS, {"layers": []}, ValueError, "layers: expected at least one"),
        (PROMPTS, {"layers": [2]}, ValueError, "layers: expected layers from 0 to 1, got 2"),
        (PROMPTS, {"layers": [1, 1]}, ValueError, "layers: expected each layer once"),
        (PROMPTS, {"layers": 1}, TypeError, "layers: expected a list"),
        (PROMPTS, {"sample": 0}, ValueError, "(sample|batch_size): expected 1 or more"),
        (PROMPTS, {"positions": "generated"}, ValueError, "nothing is generated"),
        (PROMPTS, {"positions": 9}, ValueError, "positions: expected indices below"),
    ],
)
def test_refuses(model, prompts, options, error, message):
    with pytest.raises(error, match=message):
        activation_stats(model, prompts, **options)


def test_refuses_a_mixture_of_experts():
    with pytest.raises(ValueError, match="layer 0: expected a dense MLP"):
        activation_stats(families.build("mixtral", "bridge"), PROMPTS)


@pytest.mark.parametrize("surface", [surface for surface in families.surfaces() if surface != "hf"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_is_run_to_the_end_of_a_layer_and_no_further(surface, layer):
    model, seen = families.copied(families.build("llama", surface)), []
    tokens = torch.arange(5, 12)[None]
    _, cache = model.run_with_cache(tokens)
    model.unembed.register_forward_hook(lambda *_: seen.append("unembed"))
    with attached(model, [(f"blocks.{layer}.hook_resid_post", lambda residual, hook: seen.append(residual))]):
        run_to(model, tokens, layer)
        [residual] = seen
        assert torch.allclose(residual, cache["resid_post", layer], atol=1e-5)
        run_to(model, tokens, layer)
    assert len(seen) == 2
    model(tokens)
    assert "unembed" in seen
