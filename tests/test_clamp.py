"""A clamp is a hand-written hook at the right tokens, on every surface, and nothing else."""

import math

import pytest
import torch

from tests import families
from tl_flash.clamp import clamp, clamp_hooks
from tl_flash.neurons import Neuron

SURFACES = [surface for surface in families.surfaces() if surface != "hf"]
N_PROMPT, N_NEW = 5, 6
NEURONS = {"L0N3": 2.5, (1, 7): -1.5, Neuron(1, 40): 4.0}
BY_HAND = {
    "set": lambda act, value: torch.full_like(act, value),
    "add": lambda act, value: act + value,
    "multiply": lambda act, value: act * value,
    "floor": lambda act, value: act.clamp(min=value),
    "ceil": lambda act, value: act.clamp(max=value),
}
POSITIONS = [None, 3, 7, [0, 4, 6, 9], range(2, 8), torch.tensor([1, 8]), "prompt", "generated", "last"]


@pytest.fixture(scope="module", params=SURFACES)
def model(request):
    return families.build("llama", request.param)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 70, (3, N_PROMPT), generator=torch.Generator().manual_seed(0))


def columns(positions, n_prompt, n_total):
    """The positions that a form names, by its definition."""
    if positions is None:
        return list(range(n_total))
    if isinstance(positions, int):
        positions = [positions]
    if isinstance(positions, str):
        first, end = {"prompt": (0, n_prompt), "generated": (n_prompt, n_total), "last": (n_prompt - 1, n_total)}[
            positions
        ]
        return list(range(first, end))
    return [int(p) for p in positions if p < n_total]


def by_hand(neurons, mode, chosen, hook="hook_post"):
    """One plain hook a neuron, which edits the given columns of an uncached pass."""

    def entry(neuron, value):
        layer, index = Neuron.of(neuron)

        def edit(act, hook):
            act = act.clone()
            act[:, chosen, index] = BY_HAND[mode](act[:, chosen, index], value)
            return act

        return f"blocks.{layer}.mlp.{hook}", edit

    return [entry(*item) for item in neurons.items()]


@torch.no_grad()
def greedy_by_hand(model, tokens, neurons, mode, positions):
    """Generate with one whole uncached pass a token, the columns edited by hand."""
    n_prompt = tokens.shape[1]
    for _ in range(N_NEW):
        edits = by_hand(neurons, mode, columns(positions, n_prompt, tokens.shape[1]))
        logits = model.run_with_hooks(tokens, fwd_hooks=edits)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def generate(model, prompt, *, cache, n=N_NEW):
    return model.generate(
        prompt, max_new_tokens=n, do_sample=False, stop_at_eos=False, use_past_kv_cache=cache, verbose=False
    )


def n_hooks(model):
    return sum(len(point.fwd_hooks) + len(point._forward_hooks) for point in set(model.hook_dict.values()))


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """Every test leaves the model as it found it: the same hooks, and logits equal to the bit."""
    if "model" not in request.fixturenames:
        yield
        return
    model, tokens = request.getfixturevalue("model"), request.getfixturevalue("tokens")
    before = n_hooks(model), model(tokens)
    yield
    assert n_hooks(model) == before[0]
    assert torch.equal(model(tokens), before[1])


# Equal to a hand-written hook


@pytest.mark.parametrize("mode", BY_HAND)
@pytest.mark.parametrize("positions", [None, 3, [0, 4], "prompt", "last"], ids=str)
@torch.no_grad()
def test_equals_a_hand_written_hook(model, tokens, mode, positions):
    edits = by_hand(NEURONS, mode, columns(positions, N_PROMPT, N_PROMPT))
    expected = model.run_with_hooks(tokens, fwd_hooks=edits)
    assert (expected - model(tokens)).abs().max() > 1e-2
    with clamp(model, NEURONS, mode=mode, positions=positions):
        torch.testing.assert_close(model(tokens), expected, atol=1e-6, rtol=0)
    hooks = clamp_hooks(NEURONS, mode=mode, positions=positions)
    torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, atol=1e-6, rtol=0)
    with model.hooks(fwd_hooks=clamp_hooks(NEURONS, mode=mode, positions=positions, model=model)):
        torch.testing.assert_close(model(tokens), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("family", families.DENSE)
@torch.no_grad()
def test_every_family_at_every_hook(family, surface, tokens):
    model = families.build(family, surface)
    plain = model(tokens)
    gated = families.FAMILIES[family].gate is not None
    hooks = {"post": "hook_post", "up": "hook_pre_linear" if gated else "hook_pre"}
    for at, hook in (hooks | ({"gate": "hook_pre"} if gated else {})).items():
        expected = model.run_with_hooks(tokens, fwd_hooks=by_hand(NEURONS, "add", slice(None), hook))
        assert (expected - plain).abs().max() > 1e-3
        with clamp(model, NEURONS, mode="add", at=at):
            torch.testing.assert_close(model(tokens), expected, atol=1e-6, rtol=0)
    if not gated:
        with pytest.raises(ValueError, match='at="gate".*no gate'), clamp(model, NEURONS, at="gate"):
            pass
    assert torch.equal(model(tokens), plain)


def test_gate_and_up_are_what_their_weights_write(model, tokens):
    """hook_pre is the gate in a gated MLP: act(gate) * up gives the activation that W_out reads."""
    with clamp(model, {"L0N3": 0.7}, at="gate"), clamp(model, {"L0N3": 3.0}, at="up"):
        _, cache = model.run_with_cache(tokens)
    post = cache["blocks.0.mlp.hook_post"][..., 3]
    torch.testing.assert_close(post, torch.full_like(post, 3.0 * 0.7 / (1 + math.exp(-0.7))))


# Generation: the same tokens with and without a cache


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("mode", ["set", "add"])
def test_greedy_generation_is_the_same_with_and_without_a_cache(model, tokens, mode, positions):
    neurons = {"L0N3": 9.0, "L1N7": -9.0, "L1N40": 9.0}
    expected = greedy_by_hand(model, tokens, neurons, mode, positions)
    with clamp(model, neurons, mode=mode, positions=positions):
        for cache in (True, False, True):  # repeated in one context
            assert torch.equal(generate(model, tokens, cache=cache), expected)
    hooks = clamp_hooks(neurons, mode=mode, positions=positions)
    for cache in (False, True):
        with model.hooks(fwd_hooks=hooks):
            assert torch.equal(generate(model, tokens, cache=cache), expected)


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_a_clamp_during_generation_changes_the_tokens(model, tokens, positions):
    """Or the test above would prove little."""
    neurons = {f"L{layer}N{index}": 9.0 for layer in (0, 1) for index in range(20)}
    with clamp(model, neurons, positions=positions):
        clamped = generate(model, tokens, cache=True)
    assert not torch.equal(clamped, generate(model, tokens, cache=True))


@pytest.mark.parametrize("positions", [8, "prompt", "generated", "last"])
def test_batches_of_strings_padded_on_the_left(model, positions):
    prompts = ["the dog", "the cat ran to the old red house"]
    with clamp(model, {"L0N3": 9.0, "L1N7": 9.0}, positions=positions):
        assert generate(model, prompts, cache=True) == generate(model, prompts, cache=False)


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_caches_that_forget(family, surface):
    """A bridge's sliding-window cache (16 positions here) drops the oldest: its size says nothing of the position."""
    model = families.build(family, surface)
    prompt = torch.randint(2, 70, (1, 14), generator=torch.Generator().manual_seed(1))
    for positions in (19, "generated", [3, 21]):
        with clamp(model, {"L1N7": 9.0, "L1N8": -9.0}, positions=positions):
            with_cache = generate(model, prompt, cache=True, n=10)
            assert torch.equal(with_cache, generate(model, prompt, cache=False, n=10))
            longer = generate(model, with_cache[:, :20], cache=True)
            assert torch.equal(longer, generate(model, with_cache[:, :20], cache=False))


@torch.no_grad()
def test_a_cache_filled_in_pieces_or_outside(model, tokens):
    """Pieces of a prompt are prompt, wherever the pieces before them were read."""
    expected = {}
    for positions in ("prompt", "last", 4):
        chosen = columns(positions, N_PROMPT, N_PROMPT)
        expected[positions] = model.run_with_hooks(tokens, fwd_hooks=by_hand(NEURONS, "set", chosen))[:, -1]
    for positions in ("last", 4):
        with clamp(model, NEURONS, positions=positions):
            model(torch.randint(2, 70, (3, 9)))  # another sequence before this one
        for _ in range(2):  # one prefix, read outside the clamp, under two suffixes
            prefix = read_prefix(model, tokens[:, :2])
            with clamp(model, NEURONS, positions=positions):
                logits = prefix(tokens[:, 2:])
            torch.testing.assert_close(logits[:, -1], expected[positions], atol=1e-5, rtol=0)


def read_prefix(model, tokens):
    """Fill a KV cache; returns a function that reads on from there."""
    if hasattr(model, "original_model"):
        from transformers import DynamicCache

        cache, name = DynamicCache(), "past_key_values"
    else:
        from transformer_lens import HookedTransformerKeyValueCache

        cache, name = HookedTransformerKeyValueCache.init_cache(model.cfg, "cpu", len(tokens)), "past_kv_cache"
    model(tokens, **{name: cache})
    return lambda suffix: model(suffix, **{name: cache})
