"""A clamp is a hand-written hook at the right tokens, on every surface, and nothing else."""

import math

import pytest
import torch

from tests import families
from tl_flash.clamps import clamp, clamp_hooks, clamp_rows
from tl_flash.names import Neuron

SURFACES = [surface for surface in families.surfaces() if surface != "hf"]
needs_bridge = pytest.mark.skipif(not families.HAS_BRIDGE, reason="TransformerLens 2 has no bridges")
N_PROMPT, N_NEW = 5, 6
NEURONS = {"L0N3": 2.5, (1, 7): -1.5, Neuron(1, 40): 4.0}
BY_HAND = {
    "set": lambda act, value: torch.full_like(act, value),
    "add": lambda act, value: act + value,
    "multiply": lambda act, value: act * value,
    "floor": lambda act, value: act.clamp(min=value),
    "ceil": lambda act, value: act.clamp(max=value),
}
POSITIONS = [None, 7, [0, 4, 6, 9], range(2, 8), torch.tensor([1, 8]), "prompt", "generated", "last"]


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
def test_greedy_generation_is_the_same_with_and_without_a_cache(model, tokens, positions):
    neurons = {"L0N3": 9.0, "L1N7": -9.0, "L1N40": 9.0}
    expected = greedy_by_hand(model, tokens, neurons, "add", positions)
    with clamp(model, neurons, mode="add", positions=positions):
        for cache in (True, False, True):  # repeated in one context
            assert torch.equal(generate(model, tokens, cache=cache), expected)
    hooks = clamp_hooks(neurons, mode="add", positions=positions)
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
@pytest.mark.parametrize("positions", [19, [3, 21], "prompt", "generated", "last"], ids=str)
def test_caches_that_forget(family, surface, positions):
    """A bridge's sliding-window cache (16 positions here) drops the oldest: its size says nothing of the position."""
    model = families.build(family, surface)
    values = []
    with clamp(model, {"L1N7": 9.0}, positions=positions):
        for n_prompt in (14, 20):
            prompt = torch.randint(2, 70, (1, n_prompt), generator=torch.Generator().manual_seed(1))
            with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", lambda act, hook: values.append(act[0, :, 7]))]):
                generate(model, prompt, cache=True, n=10)
            clamped = (torch.cat(values) == 9.0).nonzero()[:, 0].tolist()
            assert clamped == columns(positions, n_prompt, n_prompt + 9)  # the last token is never fed back
            values.clear()


@pytest.mark.parametrize("positions", ["prompt", "last", 4, [3, 4]], ids=str)
@torch.no_grad()
def test_one_prefix_read_outside_under_two_suffixes(model, tokens, positions):
    chosen = [column for column in columns(positions, N_PROMPT, N_PROMPT) if column >= 2]
    expected = model.run_with_hooks(tokens, fwd_hooks=by_hand(NEURONS, "set", chosen))[:, 2:]
    suffixes = [read_prefix(model, tokens[:, :2]) for _ in range(2)]
    with clamp(model, NEURONS, positions=positions):
        model(torch.full((1, 9), 5))  # a longer sequence before these
        for read in suffixes:
            torch.testing.assert_close(read(tokens[:, 2:]), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_the_model_another_sequences_cache_is_not_guessed_at(model, tokens):
    read = read_prefix(model, tokens[:, :2])
    with model.hooks(fwd_hooks=clamp_hooks(NEURONS, positions=4)):
        model(torch.full((1, 9), 5))
        with pytest.raises(RuntimeError, match="sees 2 cached positions where earlier passes had 9.*Pass model="):
            read(tokens[:, 2:])


def read_prefix(model, tokens):
    """Fill a KV cache; returns a function that reads on from there."""
    if hasattr(model, "original_model"):
        from transformers import DynamicCache

        cache, name = DynamicCache(), "past_key_values"
    else:
        if families.TRANSFORMER_LENS < 3:
            from transformer_lens.past_key_value_caching import HookedTransformerKeyValueCache as KeyValueCache
        else:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as KeyValueCache

        cache, name = KeyValueCache.init_cache(model.cfg, "cpu", len(tokens)), "past_kv_cache"
    model(tokens, **{name: cache})
    return lambda suffix: model(suffix, **{name: cache})


def test_prompts_of_growing_length_are_prompts(model):
    """Lengths alone would take the second for a generated token after the first."""
    first, second = torch.full((1, 4), 9), torch.full((1, 5), 11)
    expected = model.run_with_hooks(second, fwd_hooks=by_hand(NEURONS, "set", slice(None)))
    with clamp(model, NEURONS, positions="prompt"):
        model(first)
        torch.testing.assert_close(model(second), expected, atol=1e-6, rtol=0)


# Beside other hooks


@torch.no_grad()
def test_inside_activation_patching(model, tokens):
    from transformer_lens import patching

    def patch():
        def metric(logits):
            return logits[0, -1, 5] - logits[0, -1, 6]

        return patching.get_act_patch_resid_pre(model, tokens[1:2], clean, metric)

    _, clean = model.run_with_cache(tokens[:1])
    before = patch()
    with clamp(model, NEURONS):
        clamped = patch(), patch()
    assert torch.equal(*clamped)
    assert (clamped[0] - before).abs().max() > 1e-2
    assert torch.equal(patch(), before)


@torch.no_grad()
def test_patching_of_the_clamped_activation_itself(model, tokens):
    """The patch is added later, so it comes after the clamp."""
    from transformer_lens import patching

    with clamp(model, {"L0N3": 100.0}):
        patched = patching.generic_activation_patch(
            model,
            tokens[:1],
            model.run_with_cache(tokens[1:2])[1],
            lambda logits: logits[0, -1, 5],
            patching.layer_pos_patch_setter,
            "post",
            index_axis_names=("layer", "pos"),
        )
    assert patched.shape == (2, N_PROMPT)
    assert patched.unique().numel() > 2


def test_a_cache_holds_clamped_activations(model, tokens):
    with clamp(model, {"L1N7": -1.5}, positions=[2, 3]):
        _, cache = model.run_with_cache(tokens)
    post = cache["blocks.1.mlp.hook_post"][..., 7]
    assert (post[:, 2:4] == -1.5).all()
    assert (post[:, [0, 1, 4]] != -1.5).all()


def test_hooks_of_others_on_the_same_point_survive(model, tokens):
    seen = []

    def look(tag):
        def function(act, hook):
            seen.append((tag, act[0, 0, 3].item()))

        return function

    name = "blocks.0.mlp.hook_post"
    model.add_hook(name, look("before"))
    with clamp(model, {"L0N3": 50.0}):
        model.add_hook(name, look("during"))
        model(tokens)
        model.run_with_hooks(tokens, fwd_hooks=[(name, look("inner"))])
    plain = seen[0][1]
    assert plain != 50.0
    assert seen == [(tag, plain if tag == "before" else 50.0) for tag in "before during before during inner".split()]
    seen.clear()
    model(tokens)
    assert seen == [("before", plain), ("during", plain)]
    model.reset_hooks()


def test_nests_and_the_inner_sees_what_the_outer_left(model, tokens):
    with clamp(model, {"L0N3": 2.0}):
        once = model(tokens)
        with clamp(model, {"L0N3": 3.0}, mode="multiply"), clamp(model, {"L1N7": 1.0}):
            _, cache = model.run_with_cache(tokens)
        assert torch.equal(model(tokens), once)
    assert (cache["blocks.0.mlp.hook_post"][..., 3] == 6.0).all()
    assert (cache["blocks.1.mlp.hook_post"][..., 7] == 1.0).all()


def test_one_hook_a_layer_whatever_the_number_of_neurons(model, tokens):
    before = n_hooks(model)
    with clamp(model, {(layer, index): 0.0 for layer in (0, 1) for index in range(52)}):
        assert n_hooks(model) == before + 2 * 2  # each is in TransformerLens's list and in torch's
        model(tokens)


def test_outlives_reset_hooks(model, tokens):
    with clamp(model, {"L0N3": 9.0}):
        clamped = model(tokens)
        model.reset_hooks()
        assert torch.equal(model(tokens), clamped)


def test_says_when_others_removed_its_hook(model, tokens):
    with (
        pytest.raises(RuntimeError, match="clamp.set, 1 neurons. on blocks.0.mlp.hook_post was removed"),
        clamp(model, {"L0N3": 9.0}),
    ):
        model(tokens)
        model.reset_hooks(including_permanent=True)


def test_an_exception_passes_through_and_leaves_nothing(model):
    with pytest.raises(ZeroDivisionError), clamp(model, NEURONS, positions="generated"):
        raise ZeroDivisionError  # no pass has run: the clamp must not speak over this


def test_an_exception_in_a_pass_leaves_nothing(model, tokens):
    def fail(act, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), clamp(model, NEURONS, positions="prompt"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_post", fail)])


# Gradients and values


def test_gradients_stop_at_what_was_set_and_flow_elsewhere(model, tokens):
    kept = {}

    def keep(act, hook):
        act.retain_grad()
        kept["act"] = act

    with model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", keep)]), clamp(model, {"L0N3": 1.0}, positions=2):
        model(tokens)[:, -1].square().sum().backward()
    gradient = kept["act"].grad
    assert (gradient[:, 2, 3] == 0).all()
    assert (gradient[:, 1, 3] != 0).all() and (gradient[:, 2, 4] != 0).all()
    model.zero_grad()


@pytest.mark.parametrize("mode", ["set", "add", "multiply"])
def test_the_gradient_of_a_value_is_its_finite_difference(model, tokens, mode):
    def loss(value):
        with clamp(model, {"L0N3": value, "L0N4": 0.5}, mode=mode, positions="last"):
            return model(tokens)[:, -1].log_softmax(-1)[:, 5].sum()

    value = torch.tensor(0.3, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(value), value)
    difference = (loss(0.35) - loss(0.25)) / 0.1
    torch.testing.assert_close(gradient, difference, rtol=0.05, atol=1e-3)


def test_a_value_trained_inside_the_context_takes_effect(model, tokens):
    value = torch.nn.Parameter(torch.tensor(0.0))
    with clamp(model, {"L0N3": value}):
        model(tokens)
        value.data.fill_(4.0)
        _, cache = model.run_with_cache(tokens)
        value.data.fill_(math.nan)
        with pytest.raises(ValueError, match="not finite"):
            model(tokens)
    assert (cache["blocks.0.mlp.hook_post"][..., 3] == 4.0).all()


def test_values_by_row_and_position(model, tokens):
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    grid = torch.arange(15.0).reshape(3, 5)
    with clamp(model, {"L0N3": rows, "L0N4": grid, "L0N5": 7.0}, positions=[1, 3]):
        _, cache = model.run_with_cache(tokens)
        with pytest.raises(ValueError, match=r"broadcast to \[batch, position\] = \[3, 4\]"):
            model(tokens[:, :4])
    post = cache["blocks.0.mlp.hook_post"][:, [1, 3]]
    assert torch.equal(post[..., 3], rows.expand(3, 2))
    assert torch.equal(post[..., 4], grid[:, [1, 3]])
    assert (post[..., 5] == 7.0).all()


def test_inference_mode_and_then_gradients(model, tokens):
    with clamp(model, {"L0N3": 2.0}, mode="multiply", positions=1):
        with torch.inference_mode():
            model(tokens)
        model(tokens).sum().backward()
    model.zero_grad()


@pytest.mark.parametrize("surface", [surface for surface in SURFACES if surface.startswith("bridge")])
def test_a_pass_without_a_batch_dimension(surface, tokens):
    model = families.build("llama", surface)
    expected = model.run_with_hooks(tokens[:1], fwd_hooks=by_hand(NEURONS, "set", [3, 4]))
    hooks = clamp_hooks(NEURONS, positions=[3, 4])
    logits = model.run_with_hooks(tokens[:1], fwd_hooks=hooks, remove_batch_dim=True)
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


# Never a clamp that does nothing


@pytest.mark.parametrize(
    ("neurons", "options", "error", "message"),
    [
        ({}, {}, ValueError, "empty dict"),
        (["L0N1"], {}, TypeError, "expected a dict"),
        ({"L0N1": 1.0, (0, 1): 2.0}, {}, ValueError, "L0N1 is named twice"),
        ({"L2N0": 1.0}, {}, ValueError, "layer 2: this model's layers are 0 to 1"),
        ({"L0N52": 1.0}, {}, ValueError, "L0N52: expected an index below 52"),
        ({"dog": 1.0}, {}, ValueError, "expected a name such as"),
        ({"L0N1": math.nan}, {}, ValueError, "L0N1: expected finite"),
        ({"L0N1": -math.inf}, {"mode": "floor"}, ValueError, "L0N1: expected finite"),
        ({"L0N1": torch.tensor(math.inf)}, {}, ValueError, "L0N1: expected finite"),
        ({"L0N1": torch.tensor([])}, {}, ValueError, "L0N1: expected finite"),
        ({"L0N1": "8"}, {}, TypeError, "L0N1: expected a number or a tensor, got str"),
        ({"L0N1": True}, {}, TypeError, "L0N1: expected a number or a tensor, got bool"),
        ({"L0N1": torch.tensor(True)}, {}, TypeError, "L0N1: expected real numbers"),
        ({"L0N1": 1.0}, {"mode": "scale"}, ValueError, "mode: expected one of set, add"),
        ({"L0N1": 1.0}, {"at": "pre"}, ValueError, 'at: expected "post"'),
        ({"L0N1": 1.0}, {"positions": "all"}, ValueError, 'positions: expected "prompt"'),
        ({"L0N1": 1.0}, {"positions": -1}, ValueError, 'from 0, got -1.*"last"'),
        ({"L0N1": 1.0}, {"positions": []}, ValueError, "at least one index"),
        ({"L0N1": 1.0}, {"positions": 1.5}, TypeError, "whole numbers, got 1.5"),
        ({"L0N1": 1.0}, {"positions": [True, False]}, TypeError, "whole numbers"),
        ({"L0N1": 1.0}, {"positions": torch.tensor([True, False])}, TypeError, "whole numbers"),
    ],
)
def test_refuses(model, tokens, neurons, options, error, message):
    with pytest.raises(error, match=message), clamp(model, neurons, **options):
        model(tokens)
    with pytest.raises(error, match=message):
        clamp_hooks(neurons, **options, model=model)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (None, "no forward pass went through blocks.0.mlp.hook_post"),
        ([2, 5, 9], r"at blocks.0.mlp.hook_post, no pass reached positions \[5, 9\]"),
        ("generated", "no pass reached positions='generated'"),
    ],
)
def test_a_clamp_that_did_nothing_says_so(model, tokens, positions, message):
    with pytest.raises(RuntimeError, match=message), clamp(model, {"L0N3": 1.0}, positions=positions):
        if positions is not None:
            model(tokens)


def test_a_pass_that_stops_before_the_layer(model, tokens):
    message = "no forward pass went through blocks.1.mlp.hook_post"
    with pytest.raises(RuntimeError, match=message), clamp(model, {"L0N3": 1.0, "L1N3": 1.0}):
        model(tokens, stop_at_layer=1)


@pytest.mark.parametrize("surface", SURFACES)
def test_a_mixture_of_experts_is_refused(surface, tokens):
    """On a bridge its hook_post is another name for the block's output."""
    model = families.build("mixtral", surface)
    with pytest.raises(ValueError, match="layer 0: expected a dense MLP"), clamp(model, {"L0N3": 1.0}):
        pass
    with pytest.raises((ValueError, KeyError), match="mixture of experts|hook_post"):
        model.run_with_hooks(tokens, fwd_hooks=clamp_hooks({"L0N3": 1.0}))


def test_a_hugging_face_model_is_refused():
    with pytest.raises(TypeError, match="LlamaForCausalLM is a Hugging Face model"):
        clamp_hooks({"L0N3": 1.0}, model=families.build("llama", "hf"))


def test_without_a_model_the_pass_finds_a_wrong_neuron(model, tokens):
    with pytest.raises(ValueError, match="L0N52: expected an index below 52"):
        model.run_with_hooks(tokens, fwd_hooks=clamp_hooks({"L0N52": 1.0}))
    with pytest.raises(ValueError, match="at='gate'.*pass model="):
        clamp_hooks({"L0N1": 1.0}, at="gate")


def test_a_value_beyond_the_models_number_format(tokens):
    model = families.build("llama", SURFACES[0])
    hook = dict(clamp_hooks({"L0N1": 1e6}))["blocks.0.mlp.hook_post"]
    with pytest.raises(ValueError, match="not finite in the model's torch.float16"):
        hook(torch.zeros(1, 2, 52, dtype=torch.float16), hook=model.hook_dict["blocks.0.mlp.hook_post"])


def test_tracking_that_missed_the_pass(model, tokens):
    """The clamp alone, without the hooks that follow the sequence, would clamp the wrong tokens."""
    only = [entry for entry in clamp_hooks({"L0N3": 1.0}, positions=2) if entry[0].endswith("hook_post")]
    with pytest.raises(RuntimeError, match="blocks.0.attn.hook_pattern, did not see this pass"):
        model.run_with_hooks(tokens, fwd_hooks=only)


# Passes whose shape says nothing of the position


def hf_generated(model, tokens, **options):
    return model.original_model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=1, **options)


REPEATING = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4, 6]])


@needs_bridge
@pytest.mark.parametrize("positions", [4, "prompt", "generated", "last"])
def test_a_static_cache_is_refused_and_the_advice_works(bridge, positions):
    with pytest.raises(RuntimeError, match="static.*a cache that grows"), clamp(bridge, NEURONS, positions=positions):
        hf_generated(bridge, REPEATING, cache_implementation="static")
    with clamp(bridge, NEURONS, positions=positions):
        hf_generated(bridge, REPEATING)
    with clamp(bridge, NEURONS):
        hf_generated(bridge, REPEATING, cache_implementation="static")


@needs_bridge
@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 8}, {"prefill_chunk_size": 4}], ids=str
)
def test_passes_that_mix_prompt_and_generation_are_refused_by_name_and_right_by_index(bridge, options):
    for positions in ("prompt", "generated", "last"):
        with pytest.raises(RuntimeError, match="give positions as indices"):
            with clamp(bridge, NEURONS, positions=positions):
                hf_generated(bridge, REPEATING[:, :8] if "lookup" in str(options) else REPEATING, **options)
    neurons = {f"L0N{index}": 9.0 for index in range(20)}
    with clamp(bridge, neurons, positions=[4, 6]):
        plain = hf_generated(bridge, REPEATING)
        assert torch.equal(hf_generated(bridge, REPEATING, **options), plain)
    assert not torch.equal(plain, hf_generated(bridge, REPEATING)), "else the clamp does nothing"


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
@torch.no_grad()
def test_a_prompt_in_chunks_of_ones_own_is_refused_by_name(model, tokens, positions):
    with pytest.raises(RuntimeError, match="2 positions came upon the 3 before them.*give positions as indices"):
        with clamp(model, NEURONS, positions=positions):
            read_prefix(model, tokens[:, :3])(tokens[:, 3:5])


@torch.no_grad()
def test_a_prompt_in_chunks_is_clamped_at_its_indices(model, tokens):
    expected = model.run_with_hooks(tokens, fwd_hooks=by_hand(NEURONS, "set", [1, 4]))
    with clamp(model, NEURONS, positions=[1, 4]):
        read = read_prefix(model, tokens[:, :3])
        torch.testing.assert_close(read(tokens[:, 3:]), expected[:, 3:], atol=1e-5, rtol=0)


def test_a_row_of_a_batch_is_clamped_by_its_neurons_name(model):
    tokens = torch.tensor([[3, 4, 5], [3, 4, 5]])
    logits = []
    for neurons in (["L1N3", (0, 7)], [Neuron(1, 3), Neuron(0, 7)]):
        with torch.no_grad(), clamp_rows(model, neurons, [4.0, -4.0]):
            logits.append(model(tokens))
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("neurons", "values", "error", "message"),
    [
        ("L1N3", [1.0], TypeError, "neurons: expected a list, one for each row, got 'L1N3'"),
        (3, [1.0], TypeError, "neurons: expected a list"),
        (["L1N3"], [1.0, 2.0], ValueError, "values: expected one for each of the 1 neurons, got 2"),
        (["x"], [1.0], ValueError, 'expected a name such as "L3N17"'),
        (["L1N3"], ["much"], TypeError, "value of L1N3: expected a number or a tensor, got str"),
    ],
)
def test_rows_that_are_no_rows_are_refused(model, neurons, values, error, message):
    with pytest.raises(error, match=message), clamp_rows(model, neurons, values):
        pass
