import dataclasses
import weakref

import pytest
import torch

from tests import families
from tests.lens_truth import in_double
from tl_flash import jacobian_lens
from tl_flash.clamps import Prompts, attached
from tl_flash.lens.blocks import Block
from tl_flash.lens.classes import second_class
from tl_flash.lens.mean_field import _together, chain, field_of, local_jacobians, survey
from tl_flash.lens.norms import Norm
from tl_flash.lens.passages import passages
from tl_flash.lens.texts import TEXTS
from tl_flash.weights import read

TOKENS = torch.randint(2, 72, (3, 14), generator=torch.Generator().manual_seed(0))
SURFACES = [surface for surface in families.surfaces() if surface != "hf"]
# Of each family: whether attention and MLP are parallel, and whether a norm is before and after each of them.
MADE_OF = {
    "gpt2": (False, (True, False), (True, False)),
    "neox": (True, (True, False), (True, False)),
    "gemma2": (False, (True, True), (True, True)),
    "gemma3": (False, (True, True), (True, True)),
    "olmo2": (False, (False, True), (False, True)),
}
_PRE = (False, (True, False), (True, False))


def tangent(model, layer, constant, to=None, source=None):
    """The mean over positions but the first of one block's Jacobian by autograd, pattern and `constant` hooks held.

    Or over those of `to`, by one change of those of `source`: bool [text, position].
    """
    every = torch.zeros(TOKENS.shape, dtype=torch.bool)
    every[:, 1:] = True
    to, source = (every if which is None else which for which in (to, source))
    delta = torch.zeros(families.D_MODEL, dtype=model.W_U.dtype, requires_grad=True)
    seen = {}

    def move(residual, hook):
        return residual.detach() + delta * source[..., None]

    def keep(residual, hook):
        seen["left"] = residual

    def hold(activation, hook):
        return activation.detach()

    prefix = f"blocks.{layer}."
    hooks = [(f"{prefix}hook_resid_pre", move), (f"{prefix}hook_resid_post", keep)]
    hooks += [(prefix + name, hold) for name in ("attn.hook_pattern", *constant)]
    with torch.enable_grad(), attached(model, hooks):
        model(TOKENS)
    total = seen["left"][to].sum(0)
    rows = [torch.autograd.grad(each, delta, retain_graph=True)[0] for each in total]
    return torch.stack(rows).detach() / to.sum()


def relative(made, truth):
    return float((made - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", families.DENSE)
def test_each_factor_is_the_mean_of_exact_tangents(name):
    model = in_double(name)
    blocks = survey(model, Prompts.of(model, TOKENS))
    eye = torch.eye(families.D_MODEL, dtype=torch.float64)
    made = {}

    def take(layer, passage):
        members = passage.counted([1] * len(TOKENS))[:, None]
        made[layer] = [matrix.mean(0) for matrix in blocks[layer].jacobians(passage, members)]

    passages(model, TOKENS, take)
    for layer in (0, 1):
        attention, mlp = made[layer]
        assert relative(attention, tangent(model, layer, ["mlp.hook_post"]) - eye) < 1e-5
        assert relative(mlp, tangent(model, layer, ["attn.hook_z"]) - eye) < 1e-5


@pytest.mark.parametrize("name", families.DENSE)
def test_by_classes_too_each_factor_is_the_mean_of_exact_tangents(name):
    model = in_double(name)
    blocks = survey(model, Prompts.of(model, TOKENS))
    second = torch.zeros(TOKENS.shape, dtype=torch.bool)
    second[:, 2::3] = True
    first = ~second & (torch.arange(TOKENS.shape[1]) > 0)
    field, eye = local_jacobians(model, TOKENS, blocks, second), torch.eye(families.D_MODEL, dtype=torch.float64)
    for layer in (0, 1):
        parts = [part.mean(0) for part in field.blocks[layer].parts]  # each class has as many tokens in every text
        for i, to in enumerate((first, second)):
            for j, source in enumerate((first, second)):
                changed = tangent(model, layer, ["mlp.hook_post"], to, source) - (i == j) * eye
                mlp = tangent(model, layer, ["attn.hook_z"], to, source) - (i == j) * eye
                if blocks[layer].parallel:
                    assert relative(parts[0][i, j], changed + mlp) < 1e-5
                else:
                    assert relative(parts[0][i, j], changed) < 1e-5
                    assert i != j or relative(parts[1][i], mlp) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma3"])
def test_a_class_without_tokens_changes_nothing(name):
    model = in_double(name)
    blocks, second = survey(model, Prompts.of(model, TOKENS)), torch.zeros(TOKENS.shape, dtype=torch.bool)
    one = list(chain(local_jacobians(model, TOKENS, blocks)))
    for layer, lens in chain(local_jacobians(model, TOKENS, blocks, second)):  # of the second there is none
        assert torch.allclose(lens, dict(one)[layer], atol=1e-10)
    second[:, 1:] = True
    for layer, lens in chain(local_jacobians(model, TOKENS, blocks, second)):
        assert torch.allclose(lens, dict(one)[layer], atol=1e-10)


def test_of_as_many_classes_as_tokens_nothing_is_neglected_but_the_patterns():
    """Two tokens that count, each a class of its own: the lens is the exact one of the text."""
    row = TOKENS[0, :3]
    second = torch.tensor([[False, False, True]])
    model = in_double("llama")
    blocks = survey(model, Prompts.of(model, row[None]))
    exact = jacobian_lens(model, row[None], method="exact")
    for layer, lens in chain(local_jacobians(model, [row], blocks, second)):
        torch.testing.assert_close(lens[0].float(), exact.J[layer].float(), rtol=1e-4, atol=1e-5)


def test_the_second_class_is_told_by_the_residual_stream(bridge):
    texts = [TOKENS[0], TOKENS[1, :5], TOKENS[2, :2]]
    second = second_class(bridge, texts)
    assert second.shape == (3, 14) and not second[:, 0].any()
    assert not second[1, 5:].any() and not second[2].any(), "padding is of none, nor are there two classes of one token"
    alone = second_class(bridge, texts[1:2])
    assert torch.equal(alone[0], second[1, :5])
    layer = len(bridge.blocks) // 2
    _, cache = bridge.run_with_cache(texts[0][None])
    x = cache[f"blocks.{layer}.hook_resid_pre"][0, 1:].double()
    x = torch.nn.functional.normalize(x - x.mean(-1, keepdim=True), dim=1)
    of_first = second[0, 1:]
    assert 0 < of_first.sum() < 13
    means = torch.stack([x[~of_first].mean(0), x[of_first].mean(0)])
    assert torch.equal(torch.cdist(x, means).argmin(1).bool(), of_first)


@pytest.mark.parametrize("name", families.DENSE)
@pytest.mark.parametrize("surface", SURFACES)
def test_what_a_block_is_made_of_is_seen(name, surface):
    model = families.build(name, surface)
    for block in survey(model, Prompts.of(model, TOKENS)):
        norms = [tuple(norm is not None for norm in part) for part in (block.attention, block.mlp)]
        assert (block.parallel, *norms) == MADE_OF.get(name, _PRE)


@pytest.mark.parametrize("surface", SURFACES)
def test_a_mixture_of_experts_is_measured(surface):
    model = families.build("mixtral", surface)
    texts = Prompts.of(model, TOKENS)
    assert survey(model, texts) == [None, None]
    field = field_of(model, texts, 8)
    for layer in (0, 1):
        assert relative(field.blocks[layer].block(), tangent(model, layer, [])) < 1e-5
    assert jacobian_lens(model, TOKENS).source.measured == (0, 1)


def test_a_block_that_its_form_does_not_fit_is_measured():
    """Doubling what the MLP writes leaves all weights and hooks as they were; only the sums tell."""
    model = families.copied(families.build("llama", SURFACES[0]))
    model.blocks[1].mlp.register_forward_hook(lambda module, given, answer: 2 * answer)
    texts = Prompts.of(model, TOKENS)
    blocks = survey(model, texts)
    assert blocks[0] is not None and blocks[1] is None
    field = field_of(model, texts, 8)
    assert relative(field.blocks[1].block(), tangent(model, 1, [])) < 1e-5
    assert jacobian_lens(model, TOKENS).source.measured == (1,)


def test_an_activation_that_mixes_neurons_has_no_closed_form():
    model = families.build("llama", SURFACES[0])
    shown = {}
    passages(model, TOKENS, lambda layer, passage: shown.setdefault(layer, passage))
    passage, module = shown[0], model.blocks[0]
    assert Block.of(module, passage) is not None
    mixed = dataclasses.replace(passage, post=passage.post + 0 * sum(passage.pre).cumsum(-1))
    assert Block.of(module, mixed) is not None
    mixed = dataclasses.replace(passage, post=passage.post + 1e-4 * sum(passage.pre).cumsum(-1))
    assert Block.of(module, mixed) is None


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 0.1])
@pytest.mark.parametrize("width", [40, 41])
def test_a_norm_is_known_by_its_answers(centre, eps, width):
    generator = torch.Generator().manual_seed(0)
    gain, bias, x = torch.randn(3, width, dtype=torch.float64, generator=generator)

    def norm(v):
        v = v - v.mean(-1, keepdim=True) if centre else v
        return gain * v / (v.square().mean(-1, keepdim=True) + eps).sqrt() + bias

    found = Norm.probe(norm, x)
    assert found.centre == centre and found.eps == pytest.approx(eps, rel=1e-4, abs=1e-9)
    torch.testing.assert_close(found(x), norm(x), rtol=1e-4, atol=1e-6)
    n, r = found.unit(x)
    jacobian = torch.autograd.functional.jacobian(norm, x)
    eye = torch.eye(width, dtype=torch.float64)
    made = found.after(r * (eye - torch.outer(n, n) / width)) if not centre else None
    if made is None:
        made = found.gain[:, None] * r * (eye - 1 / width - torch.outer(n, n) / width)
    torch.testing.assert_close(made, jacobian, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "gemma2", "olmo2", "mixtral"])
def test_the_lens_does_not_depend_on_the_surface(name):
    lenses = [jacobian_lens(families.build(name, surface), TOKENS) for surface in SURFACES]
    weights = [read(families.build(name, surface)) for surface in SURFACES]
    writes = [lens.carry(one.directions(0, "out"), 0) for lens, one in zip(lenses, weights, strict=True)]
    for write in writes[1:]:
        assert relative(write, writes[0]) < 1e-4


def test_after_the_last_block_it_is_the_exact_lens(bridge):
    exact = jacobian_lens(bridge, TOKENS, method="exact", layers=[1])
    assert torch.allclose(jacobian_lens(bridge, TOKENS, layers=[1]).J, exact.J, atol=1e-6)


def test_of_one_position_to_another_nothing_is_neglected(bridge):
    """Of a single text of two tokens each block has one Jacobian, and the mean of one is itself."""
    exact = jacobian_lens(bridge, TOKENS[:1, :2], method="exact")
    assert torch.allclose(jacobian_lens(bridge, TOKENS[:1, :2]).J, exact.J, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral"])
def test_the_sums_of_batches_add_up(name):
    model = families.build(name, SURFACES[0])
    texts = Prompts(tuple(row[:length] for row, length in zip(TOKENS, (9, 14, 14), strict=True)))
    one, many = (field_of(model, texts, size) for size in (1, 8))
    for a, b in zip((*one.blocks, one.final), (*many.blocks, many.final), strict=True):
        assert relative(a.block(), b.block()) < 1e-5 and a.tokens == b.tokens


@pytest.mark.parametrize("name", [*families.DENSE, "mixtral"])
@pytest.mark.parametrize("surface", SURFACES)
def test_it_is_the_mean_over_texts_and_so_is_its_standard_error(name, surface):
    """Texts of different lengths are padded to be run together, and no padding is seen."""
    model = families.build(name, surface)
    texts = [text[:length] for text, length in zip(TOKENS, (14, 5, 9), strict=True)]
    lens = jacobian_lens(model, texts)
    each = torch.stack([jacobian_lens(model, [text]).J for text in texts])
    assert torch.allclose(lens.J, each.mean(0), atol=1e-5)
    assert torch.allclose(lens.stderr, each.std(0) / len(texts) ** 0.5, atol=1e-5)
    assert lens.source.prompts == 3 and jacobian_lens(model, texts[:1]).stderr.isnan().all()


@pytest.mark.parametrize("surface", SURFACES)
def test_padding_is_no_padding_token_to_a_tokenizer_that_pads_on_the_left(surface):
    model = families.copied(families.build("llama", surface))
    texts = [text[:length] for text, length in zip(TOKENS[:2], (14, 5), strict=True)]
    before = jacobian_lens(model, texts)
    model.tokenizer = families.tokenizer()
    model.tokenizer.padding_side = "left"
    assert torch.equal(jacobian_lens(model, texts).J, before.J)


def test_long_texts_are_run_alone_and_short_ones_together():
    lengths = [600, 3, 64, 300, 64, 513, 2, 200, 512]
    batches = [[len(row) for row in batch] for batch in _together([torch.zeros(n) for n in lengths], 8)]
    assert batches == [[2, 3, 64, 64], [200], [300], [512], [513], [600]]
    assert [len(batch) for batch in _together([torch.zeros(64)] * 20, 8)] == [8, 8, 4]
    assert [len(batch) for batch in _together([torch.zeros(64)] * 3, 0)] == [1, 1, 1]


def test_one_layer_is_held_at_a_time(bridge):
    held, alive = [], []

    def take(layer, passage):
        alive.append([reference() is not None for reference in held])
        held.append(weakref.ref(passage))

    passages(bridge, TOKENS, take)
    assert alive == [[], [False]]


def test_without_prompts_it_has_texts_of_its_own(bridge):
    lens = jacobian_lens(bridge)
    read_at_all = [text for text in TEXTS[::4] if bridge.to_tokens(text).shape[1] > 1]  # of few letters it knows
    assert lens.source.prompts == len(read_at_all) and lens.J.isfinite().all() and len(TEXTS) == 64
    assert lens.source.method == "mean_field" and lens.source.seconds > 0


def test_the_model_is_left_as_it_was(bridge):
    before = bridge(TOKENS)
    jacobian_lens(bridge, TOKENS)
    assert torch.equal(bridge(TOKENS), before)
    assert all(parameter.grad is None for parameter in bridge.parameters())
    modules = [module for module in bridge.modules() if module._forward_hooks]
    assert all(not module._forward_hooks_with_kwargs for module in modules)
