import copy
import dataclasses
from functools import cache

import pytest
import torch

from tests import families
from tl_flash import activation_stats, check_lens, clamp, compare, decode_directions, flash_decode, validate
from tl_flash.clamps import Answers, Prompts
from tl_flash.lens import JacobianLens, jacobian_lens
from tl_flash.lens.lens import signature
from tl_flash.weights import read

PROMPTS = ["a dog", "the cat and a dog ran", "the red house"]
SURFACES = [surface for surface in families.surfaces() if surface != "hf"]
LAYER_NORM = ["gpt2", "neox"]  # neox with parallel attention
RMS_NORM = ["llama", "gemma2", "olmo2"] if families.HAS_HOOKED_TRANSFORMER else []  # two with norms after the MLP
FAMILIES = LAYER_NORM + RMS_NORM


@cache
def in_double(name):
    """A model that computes in float64 throughout: Hugging Face's RMS norms do not, HookedTransformer's can."""
    if not families.HAS_HOOKED_TRANSFORMER:
        return families._bridge(name, compatible=False).double()
    model = families._hooked(name, processed=False)
    model.cfg.dtype = torch.float64
    return model.double()


def difference(model, tokens, layer, delta, same, centre):
    """Central difference of the normalised final residual stream at the last position, float64."""
    last = len(model.blocks) - 1
    seen = {}

    def run(step):
        def add(residual, hook):
            moved = residual.clone()
            moved[:, -1 if same else slice(None)] += step * delta
            return moved

        def keep(residual, hook):
            seen["final"] = residual[0, -1]

        hooks = [(f"blocks.{layer}.hook_resid_post", add), (f"blocks.{last}.hook_resid_post", keep)]
        with torch.no_grad():
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        final = seen["final"]
        if centre:
            final = final - final.mean()
        return final / (final.square().mean() + model.cfg.eps).sqrt()

    step = 1e-5
    return (run(step) - run(-step)) / (2 * step)


@pytest.mark.parametrize("same", [False, True], ids=["all", "same"])
@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_jacobian_is_a_finite_difference(name, surface, same):
    model = families.build(name, surface)
    lens = jacobian_lens(model, PROMPTS, positions="same" if same else "all")
    double = in_double(name)
    centre = read(model).centre
    for layer in (0, 1):
        for coordinate in (0, 17):
            delta = torch.zeros(lens.J.shape[-1], dtype=torch.float64)
            delta[coordinate] = 1
            columns = [difference(double, model.to_tokens(text), layer, delta, same, centre) for text in PROMPTS]
            truth = torch.stack(columns).mean(0)
            error = (lens.of(layer)[:, coordinate].double() - truth).norm() / truth.norm()
            assert float(error) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lens_does_not_depend_on_the_surface(name):
    tokens = torch.arange(24).view(3, 8)  # to_tokens differs: some surfaces put a beginning-of-sequence token first
    lenses = [jacobian_lens(families.build(name, surface), tokens) for surface in SURFACES]
    weights = [read(families.build(name, surface)) for surface in SURFACES]
    writes = [lens.carry(one.directions(0, "out"), 0) for lens, one in zip(lenses, weights, strict=True)]
    for write, lens, own in zip(writes[1:], lenses[1:], weights[1:], strict=True):
        assert float((write - writes[0]).norm() / writes[0].norm()) < 1e-4
        lenses[0].require_model(own)
        lens.require_model(weights[0])


def test_all_layers_come_from_one_backward_sweep(bridge, monkeypatch):
    swept, forwards = [], []
    grad = torch.autograd.grad
    run = type(bridge).run_with_hooks

    def counted_grad(output, inputs, seeds, **more):
        swept.append(len(seeds))
        return grad(output, inputs, seeds, **more)

    def counted_run(self, *args, **more):
        forwards.append(self)
        return run(self, *args, **more)

    monkeypatch.setattr(torch.autograd, "grad", counted_grad)
    monkeypatch.setattr(type(bridge), "run_with_hooks", counted_run)
    jacobian_lens(bridge, torch.arange(24).view(3, 8))
    assert sum(swept) == bridge.cfg.d_model and len(forwards) == 1


def test_batches_do_not_matter(bridge):
    one, three = jacobian_lens(bridge, PROMPTS, batch_size=1), jacobian_lens(bridge, PROMPTS)
    assert torch.allclose(one.J, three.J, atol=1e-6) and torch.allclose(one.stderr, three.stderr, atol=1e-6)


def test_the_standard_error_is_that_of_the_mean_over_prompts(bridge):
    each = torch.stack([jacobian_lens(bridge, [prompt]).J for prompt in PROMPTS])
    lens = jacobian_lens(bridge, PROMPTS)
    assert torch.allclose(lens.J, each.mean(0), atol=1e-6)
    assert torch.allclose(lens.stderr, each.std(0) / len(PROMPTS) ** 0.5, atol=1e-5)
    assert jacobian_lens(bridge, PROMPTS[:1]).stderr.isnan().all()


def test_the_last_layer_is_the_norm_alone(bridge):
    """After the last block nothing follows but the norm, whose Jacobian is (1 - u u' / D) / rms."""
    tokens = bridge.to_tokens(PROMPTS[0])
    _, cache = bridge.run_with_cache(tokens)
    final = cache["blocks.1.hook_resid_post"][0, -1].double()
    rms = (final.square().mean() + bridge.cfg.eps).sqrt()
    unit = final / rms
    own = (torch.eye(len(final), dtype=torch.float64) - torch.outer(unit, unit) / len(final)) / rms
    assert torch.allclose(jacobian_lens(bridge, PROMPTS[:1]).of(1).double(), own, atol=1e-5)


def test_layers_can_be_chosen(bridge):
    lens = jacobian_lens(bridge, PROMPTS, layers=[1])
    assert lens.layers == (1,) and torch.equal(lens.J[0], jacobian_lens(bridge, PROMPTS).of(1))
    with pytest.raises(ValueError, match=r"holds layers \[1\]"):
        lens.of(0)


def test_the_model_is_left_as_it_was(bridge):
    tokens = bridge.to_tokens(PROMPTS[0])
    before = bridge(tokens)
    jacobian_lens(bridge, PROMPTS)
    assert torch.equal(bridge(tokens), before)
    assert all(parameter.grad is None for parameter in bridge.parameters())


def test_round_trip(bridge, tmp_path):
    lens = jacobian_lens(bridge, PROMPTS)
    lens.save(tmp_path / "lens.safetensors")
    loaded = JacobianLens.load(tmp_path / "lens.safetensors")
    assert torch.equal(loaded.J, lens.J) and loaded.source == lens.source and loaded.layers == lens.layers
    loaded.require_model(read(bridge))
    assert "3 prompts" in repr(loaded)


def test_a_lens_of_another_model_is_refused(bridge):
    lens = jacobian_lens(bridge, PROMPTS)
    other = read(families.build("mistral", SURFACES[0]))
    with pytest.raises(ValueError, match="another model"):
        lens.require_model(other)
    weights = read(bridge)
    nudged = dataclasses.replace(weights, W_U=weights.W_U * 1.001)
    with pytest.raises(ValueError, match="weights differ by 0.001"):
        lens.require_model(nudged)
    assert signature(weights).shape == (5, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "last"}, "positions: expected"),
        ({"layers": [2]}, "layers from 0 to 1"),
        ({"layers": []}, "at least one"),
    ],
)
def test_wrong_options_are_refused(bridge, options, message):
    with pytest.raises(ValueError, match=message):
        jacobian_lens(bridge, PROMPTS, **options)
    with pytest.raises(ValueError, match="prompts"):
        jacobian_lens(bridge, [])


def test_prompts_are_texts(bridge):
    assert jacobian_lens(bridge, Prompts.of(bridge, PROMPTS[:1]).rows[0][None]).source.tokens > 1


@pytest.fixture(scope="module")
def lens(bridge):
    return jacobian_lens(bridge, PROMPTS)


def test_the_out_side_through_the_lens(bridge, lens):
    through = flash_decode(bridge, side="out", lens=lens, k=4)
    weights = read(bridge)
    for layer in (0, 1):
        x = weights.directions(layer, "out") @ lens.of(layer).T
        plain = decode_directions(x, bridge, k=4)
        assert torch.equal(through.positive.ids[layer], plain.positive.ids[0])
        assert torch.allclose(through.positive.write_z[layer], plain.positive.z[0], atol=1e-4)
    assert not torch.equal(through.positive.ids, flash_decode(bridge, side="out", k=4).positive.ids)
    assert through.source.lens == lens.fingerprint and "through a lens" in repr(through)


def test_write_z_of_the_read_sides_is_through_the_lens(bridge, lens):
    plain, through = flash_decode(bridge, k=4), flash_decode(bridge, k=4, lens=lens)
    assert torch.equal(plain.positive.ids, through.positive.ids)
    out = flash_decode(bridge, side="out", lens=lens, k=72)
    top = through.positive.ids[1, 3, 0]
    place = int((out.positive.ids[1, 3] == top).nonzero())
    assert float(through.positive.write_z[1, 3, 0]) == pytest.approx(float(out.positive.z[1, 3, place]), abs=1e-4)


def test_directions_through_the_lens(bridge, lens):
    x = torch.randn(40, 40)
    through = decode_directions(x, bridge, layer=0, lens=lens, k=3)
    assert torch.equal(through.positive.ids, decode_directions(lens.carry(x, 0), bridge, k=3).positive.ids)
    for options in ({"lens": lens}, {"layer": 0}, {"layer": 0, "lens": lens, "fold_ln": False}):
        with pytest.raises(ValueError, match="lens: expected a lens, its layer"):
            decode_directions(x, bridge, **options)


def test_a_lens_that_does_not_fit_is_refused(bridge, lens):
    with pytest.raises(ValueError, match="another model"):
        flash_decode(families.build("mistral", SURFACES[0]), lens=lens)
    with pytest.raises(ValueError, match="fold_ln=True"):
        flash_decode(bridge, lens=lens, fold_ln=False)
    with pytest.raises(ValueError, match=r"holds layers \[1\]"):
        flash_decode(bridge, lens=jacobian_lens(bridge, PROMPTS, layers=[1]))
    with pytest.raises(ValueError, match="same use of a lens"):
        compare(flash_decode(bridge), flash_decode(bridge, lens=lens))


def test_validation_through_the_lens(bridge, lens):
    hits = flash_decode(bridge, side="out", lens=lens).specialised(2, quantile=0.5)
    assert validate(bridge, hits, prompts=PROMPTS, controls=2, lens=lens).share_raised() > 0
    with pytest.raises(ValueError, match="the lens that the map was made with"):
        validate(bridge, hits, prompts=PROMPTS, controls=2)


def test_check_lens_measures_one_clamp_at_a_time(bridge):
    lens = jacobian_lens(bridge, PROMPTS)
    texts = ["the cat", "a red house and a dog"]
    frame = check_lens(bridge, lens, texts, n=1, doses=[0.5, 5.0], seed=3)
    assert len(frame) == len(lens.layers) * 2 * 2
    assert list(frame.columns) == ["layer", "dose", "reading", "correlation", "correlation_stderr", "top_raised"]
    generator = torch.Generator().manual_seed(3)
    stats, weights = activation_stats(bridge, texts), read(bridge)
    W_U = weights.W_U.float() * weights.final_gain[:, None]
    prompts = Prompts.of(bridge, texts)
    for layer in lens.layers:
        index = int(torch.randperm(weights.d_mlp, generator=generator)[0])
        before = Answers.of(bridge, prompts).log_probs
        with clamp(bridge, {(layer, index): 5.0 * stats[layer, index].std}):
            effect = (Answers.of(bridge, prompts).log_probs - before).mean(0)
        x = weights.directions(layer, "out")[[index]]
        for reading, scores in (("plain", x @ W_U), ("lens", lens.carry(x, layer) @ W_U)):
            row = frame.query(f"layer == {layer} and dose == 5 and reading == '{reading}'").iloc[0]
            expected = torch.corrcoef(torch.stack([scores[0], effect]))[0, 1]
            assert row["correlation"] == pytest.approx(float(expected), abs=1e-4)
            assert row["top_raised"] == float(scores[0].argmax() in effect.topk(10).indices)


def test_the_lens_predicts_small_effects_on_its_own_prompt(bridge):
    tokens = bridge.to_tokens("the cat and a dog ran")
    frame = check_lens(bridge, jacobian_lens(bridge, tokens), tokens, n=8, doses=[0.01], mode="add")
    correlation = frame.set_index(["reading", "layer"])["correlation"]
    assert (correlation["lens"] > 0.99).all()
    assert correlation["plain"].loc[0] < correlation["lens"].loc[0]


def test_check_lens_refuses(bridge):
    lens = jacobian_lens(bridge, PROMPTS)
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
    with pytest.raises(ValueError, match="never changes on them"):
        check_lens(bridge, lens, bridge.to_tokens("a dog")[:, -1:], n=2)
    other = dataclasses.replace(lens, signature=lens.signature + 1)
    with pytest.raises(ValueError, match="another model"):
        check_lens(bridge, other, PROMPTS, n=2)


@pytest.mark.skipif(not families.HAS_HOOKED_TRANSFORMER, reason="needs HookedTransformer")
def test_a_quantised_model_is_refused():
    model = copy.deepcopy(families.build("gpt2", "hooked"))
    mlp = model.blocks[1].mlp
    mlp.W_in = torch.nn.Parameter(torch.zeros(mlp.W_in.shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        jacobian_lens(model, PROMPTS)
