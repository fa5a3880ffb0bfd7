from functools import partial

import pytest
import torch

from tests import families
from tests.lens_truth import difference, in_double
from tl_flash.lens import jacobian_lens
from tl_flash.weights import read

PROMPTS = ["a dog", "the cat and a dog ran", "the red house"]
SURFACES = [surface for surface in families.surfaces() if surface != "hf"]
LAYER_NORM = ["gpt2", "neox"]  # neox with parallel attention
RMS_NORM = ["llama", "gemma2", "olmo2"] if families.HAS_HOOKED_TRANSFORMER else []  # two with norms after the MLP
FAMILIES = LAYER_NORM + RMS_NORM
TEXTS = [torch.arange(start, start + length) for start, length in ((2, 12), (9, 14), (30, 6))]
exact_lens = partial(jacobian_lens, method="exact")


@pytest.mark.parametrize("freeze", [False, True], ids=["moving", "frozen"])
@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_exact_lens_is_a_finite_difference(name, surface, freeze):
    model = families.build(name, surface)
    lens = jacobian_lens(model, TEXTS, method="exact", freeze_attention=freeze)
    double = in_double(name)
    centre = read(model).centre
    for layer in (0, 1):
        frozen = range(layer + 1, 2) if freeze else ()
        for coordinate in (0, 17):
            delta = torch.zeros(lens.J.shape[-1], dtype=torch.float64)
            delta[coordinate] = 1
            columns = [difference(double, text[None], layer, delta, centre, frozen) for text in TEXTS]
            truth = torch.stack(columns).mean(0)
            error = (lens.at(layer)[:, coordinate].double() - truth).norm() / truth.norm()
            assert float(error) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lens_does_not_depend_on_the_surface(name):
    tokens = torch.arange(24).view(3, 8)  # to_tokens differs: some surfaces put a beginning-of-sequence token first
    lenses = [exact_lens(families.build(name, surface), tokens) for surface in SURFACES]
    weights = [read(families.build(name, surface)) for surface in SURFACES]
    writes = [lens.carry(one.directions(0, "out"), 0) for lens, one in zip(lenses, weights, strict=True)]
    for write, lens, own in zip(writes[1:], lenses[1:], weights[1:], strict=True):
        assert float((write - writes[0]).norm() / writes[0].norm()) < 1e-4
        lenses[0].require_model(own)
        lens.require_model(weights[0])


def test_all_layers_come_from_one_backward_sweep(bridge, monkeypatch):
    swept, forwards = [], []
    grad = torch.autograd.grad
    forward = type(bridge).forward

    def counted_grad(output, inputs, seeds, **more):
        swept.append(len(seeds))
        return grad(output, inputs, seeds, **more)

    def counted_forward(self, *args, **more):
        forwards.append(self)
        return forward(self, *args, **more)

    monkeypatch.setattr(torch.autograd, "grad", counted_grad)
    monkeypatch.setattr(type(bridge), "forward", counted_forward)
    exact_lens(bridge, torch.arange(24).view(3, 8))
    assert sum(swept) == bridge.cfg.d_model and len(forwards) == 1


def test_batches_do_not_matter(bridge):
    one, three = exact_lens(bridge, PROMPTS, batch_size=1), exact_lens(bridge, PROMPTS)
    assert torch.allclose(one.J, three.J, atol=1e-6) and torch.allclose(one.stderr, three.stderr, atol=1e-6)


def test_the_standard_error_is_that_of_the_mean_over_prompts(bridge):
    each = torch.stack([exact_lens(bridge, [prompt]).J for prompt in PROMPTS])
    lens = exact_lens(bridge, PROMPTS)
    assert torch.allclose(lens.J, each.mean(0), atol=1e-6)
    assert torch.allclose(lens.stderr, each.std(0) / len(PROMPTS) ** 0.5, atol=1e-5)
    assert exact_lens(bridge, PROMPTS[:1]).stderr.isnan().all()


def test_the_last_layer_is_the_norm_alone(bridge):
    """After the last block nothing follows but the norm, whose Jacobian is (1 - u u' / D) / rms."""
    tokens = bridge.to_tokens(PROMPTS[0])
    _, cache = bridge.run_with_cache(tokens)
    final = cache["blocks.1.hook_resid_post"][0, -1].double()  # of a text of less than nine tokens the last counts
    rms = (final.square().mean() + bridge.cfg.eps).sqrt()
    unit = final / rms
    own = (torch.eye(len(final), dtype=torch.float64) - torch.outer(unit, unit) / len(final)) / rms
    assert torch.allclose(exact_lens(bridge, PROMPTS[:1]).at(1).double(), own, atol=1e-5)


def test_texts_are_read_until_the_error_is_small_enough(bridge):
    texts = torch.randint(2, 72, (24, 12), generator=torch.Generator().manual_seed(0))
    whole = exact_lens(bridge, texts, batch_size=4)
    wanted = 1.5 * float(whole.relative_error().max())
    lens = exact_lens(bridge, texts, batch_size=4, max_error=wanted)
    n = lens.source.prompts
    assert 4 < n < 24 and lens.source.tokens == 12 * n
    assert float(lens.relative_error().max()) <= wanted
    assert torch.allclose(lens.J, exact_lens(bridge, texts[:n]).J, atol=1e-6)
    assert float(exact_lens(bridge, texts[: n - 4]).relative_error().max()) > wanted


def test_a_zero_first_embedding_does_not_matter():
    """Its derivative is without bound; position 0 is left alone, so that nothing of it is seen."""
    model = families.copied(families.build("llama", SURFACES[0]))
    with torch.no_grad():
        model.W_E[0] = 1e-9
    tokens = torch.cat([torch.zeros(3, 1, dtype=torch.long), torch.randint(2, 72, (3, 12))], dim=1)
    for method in ("exact", "mean_field"):
        assert float(jacobian_lens(model, tokens, method=method).J.norm()) < 10
