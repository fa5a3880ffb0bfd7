import copy
import dataclasses
from functools import partial

import pytest
import torch

from tests import families
from tl_flash import (
    artefacts,
    compare,
    decode_directions,
    decode_to_file,
    flash_decode,
    load_model,
    validate,
)
from tl_flash.clamps import Prompts
from tl_flash.decode import resume
from tl_flash.decode.parts import Parts
from tl_flash.lens import JacobianLens, jacobian_lens
from tl_flash.lens.lens import signature
from tl_flash.weights import read

PROMPTS = ["a dog", "the cat and a dog ran", "the red house"]
SURFACES = [surface for surface in families.surfaces() if surface != "hf"]
exact_lens = partial(jacobian_lens, method="exact")


def test_layers_can_be_chosen(bridge):
    lens = exact_lens(bridge, PROMPTS, layers=[1])
    assert lens.layers == (1,) and torch.equal(lens.J[0], exact_lens(bridge, PROMPTS).at(1))
    with pytest.raises(ValueError, match=r"holds layers \[1\]"):
        lens.at(0)


def test_the_model_is_left_as_it_was(bridge):
    tokens = bridge.to_tokens(PROMPTS[0])
    before = bridge(tokens)
    exact_lens(bridge, PROMPTS)
    assert torch.equal(bridge(tokens), before)
    assert all(parameter.grad is None for parameter in bridge.parameters())


@pytest.mark.parametrize("method", ["mean_field", "exact"])
@pytest.mark.parametrize("surface", SURFACES)
def test_a_model_can_be_copied_after_a_lens(surface, method):
    model = families.copied(families.build("gpt2", surface))
    jacobian_lens(model, PROMPTS, method=method)
    copy.deepcopy(model)


def test_round_trip(bridge, tmp_path):
    lens = exact_lens(bridge, PROMPTS)
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


def test_a_layer_that_writes_nothing_hides_no_other_model(bridge):
    pruned, other = families.copied(bridge), families.copied(bridge)
    with torch.no_grad():
        for model in (pruned, other):
            families.held_W_out(model, 0).zero_()
        families.held_W_out(other, 1).mul_(-3)
    lens = jacobian_lens(pruned, PROMPTS)
    lens.require_model(read(pruned))
    with pytest.raises(ValueError, match="another model"):
        lens.require_model(read(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "plain"}, 'method: expected "mean_field"'),
        ({"max_error": 0.1}, "max_error: it is for"),
        ({"method": "exact", "max_error": 0.0}, "max_error: expected"),
        ({"freeze_attention": False}, "freeze_attention: it is for"),
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
        x = weights.directions(layer, "out") @ lens.at(layer).T
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


def test_a_lens_is_made_on_the_way(bridge, tmp_path):
    made = jacobian_lens(bridge)
    through = flash_decode(bridge, side="out", lens="auto", k=3)
    given = flash_decode(bridge, side="out", lens=made, k=3)
    assert through.source == given.source and through.source.lens_made == made.source.made
    assert torch.equal(through.positive.ids, given.positive.ids)
    x = torch.randn(3, 40)
    directions = decode_directions(x, bridge, layer=0, lens="auto", k=3)
    assert torch.equal(directions.positive.ids, decode_directions(x, bridge, layer=0, lens=made, k=3).positive.ids)
    kept = decode_to_file(bridge, tmp_path / "map.safetensors", side="out", lens="auto", k=3)
    assert torch.equal(kept.positive.ids, given.positive.ids) and kept.source.lens == made.fingerprint
    assert not (tmp_path / "map.safetensors.parts").exists()


def test_a_decode_that_was_killed_goes_on_with_its_lens(bridge, tmp_path, monkeypatch):
    out = tmp_path / "map.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "keep", lambda self, part: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            decode_to_file(bridge, out, side="out", lens="auto", k=3)
    with monkeypatch.context() as patch:
        patch.setattr(resume, "jacobian_lens", None)
        resumed = decode_to_file(bridge, out, side="out", lens="auto", k=3)
    whole = flash_decode(bridge, side="out", lens="auto", k=3)
    assert torch.equal(resumed.positive.ids, whole.positive.ids)


def test_what_does_not_run_has_no_lens(stories_path, bridge, monkeypatch):
    advice = "the name of a checkpoint; load it first, as load_model"
    for attempt in (
        lambda: flash_decode(str(stories_path), lens="auto"),
        lambda: decode_directions(torch.randn(2, 64), stories_path, layer=0, lens="auto"),
        lambda: jacobian_lens(stories_path),
    ):
        with pytest.raises(TypeError, match=advice):
            attempt()
    assert flash_decode(load_model(stories_path, surface=None), side="out", lens="auto", k=2).source.lens_made
    with pytest.raises(TypeError, match="boot_transformers"):
        jacobian_lens(families.hf_model("llama"))
    with pytest.raises(ValueError, match="lens: expected a JacobianLens or \"auto\", got 'lens.safetensors'"):
        flash_decode(bridge, lens="lens.safetensors")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no tokenizer for the package's own texts"):
        patch.setattr(bridge, "tokenizer", None)
        jacobian_lens(bridge)
    with pytest.raises(ValueError, match="at least two tokens each"):
        jacobian_lens(bridge, torch.tensor([[3]]))


def test_files_of_format_1_are_read(bridge, tmp_path):
    lens = exact_lens(bridge, PROMPTS)
    old = {"model": "tiny/llama", "dtype": "float32", "positions": "all", "prompts": 3, "tokens": 15}
    tensors = {"J": lens.J, "stderr": lens.stderr, "signature": lens.signature}
    artefacts.write(
        "tl_flash.JacobianLens", 1, {"layers": [0, 1], "source": old}, tensors, tmp_path / "old.safetensors"
    )
    loaded = JacobianLens.load(tmp_path / "old.safetensors")
    assert torch.equal(loaded.J, lens.J) and loaded.source.method == "exact" and loaded.source.prompts == 3


def test_validation_through_the_lens(bridge, lens):
    hits = flash_decode(bridge, side="out", lens=lens).specialised(2, quantile=0.5)
    assert validate(bridge, hits, prompts=PROMPTS, controls=2, lens=lens).share_raised() > 0
    with pytest.raises(ValueError, match="the lens that the map was made with"):
        validate(bridge, hits, prompts=PROMPTS, controls=2)


@pytest.mark.skipif(not families.HAS_HOOKED_TRANSFORMER, reason="needs HookedTransformer")
def test_a_quantised_model_is_refused():
    model = families.copied(families.build("gpt2", "hooked"))
    mlp = model.blocks[1].mlp
    mlp.W_in = torch.nn.Parameter(torch.zeros(mlp.W_in.shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        jacobian_lens(model, PROMPTS)


@pytest.mark.skipif(not families.HAS_HOOKED_TRANSFORMER, reason="needs HookedTransformer")
@pytest.mark.parametrize("method", ["mean_field", "exact"])
def test_without_a_final_norm_the_last_layers_lens_is_the_identity(method):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = dict(n_layers=2, d_model=16, n_ctx=16, d_head=8, n_heads=2, d_mlp=32, d_vocab=30, act_fn="gelu", seed=0)
    model = HookedTransformer(HookedTransformerConfig(**sizes, normalization_type=None))
    lens = jacobian_lens(model, torch.arange(24).view(2, 12), method=method)
    torch.testing.assert_close(lens.at(1), torch.eye(16))
