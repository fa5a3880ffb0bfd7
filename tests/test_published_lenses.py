import copy

import pytest
import torch

from tests import families
from tl_flash import JacobianLens, flash_decode, jacobian_lens

TheirLens = pytest.importorskip("transformer_lens.tools.analysis").JacobianLens
TEXTS = ["the dog saw a cat and the cat ran to the red house near the old sea with my dear friend Tom"] * 2
TEXTS += ["my friend Tom ran to the sea and the old dog saw the red house near the cat with a dear friend"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return families.build(name, "bridge")


@pytest.fixture(scope="module")
def theirs(model):
    return TheirLens.fit(model, TEXTS, corpus="tests", skip_first_positions=8, show_progress=False)


def test_a_lens_that_transformer_lens_fits_is_taken_over(model, theirs):
    """Theirs sums over targets from each source, ours over sources to each target, and leaves the norm's mean apart."""
    lens = JacobianLens.of(theirs, model, TEXTS)
    assert lens.layers == (0, 1) and lens.source.method == "published" and lens.source.prompts == 3
    ours = jacobian_lens(model, TEXTS, method="exact", freeze_attention=False)
    assert torch.allclose(lens.at(1), ours.at(1), atol=1e-5)
    agreement = torch.nn.functional.cosine_similarity(lens.at(0).flatten(), ours.at(0).flatten(), dim=0)
    assert agreement > 0.9
    assert flash_decode(model, side="out", lens=lens).source.lens == lens.fingerprint


@pytest.mark.skipif(not families.HAS_HOOKED_TRANSFORMER, reason="needs HookedTransformer")
def test_it_serves_the_folded_model_too(name, model, theirs):
    folded = families.build(name, "hooked")
    plain, of_folded = JacobianLens.of(theirs, model, TEXTS), JacobianLens.of(theirs, folded, TEXTS)
    tops = [flash_decode(each, side="out", lens=lens, k=3) for each, lens in ((model, plain), (folded, of_folded))]
    assert torch.equal(tops[0].positive.ids, tops[1].positive.ids)


def test_a_stale_or_foreign_lens_is_refused(name, model, theirs):
    with pytest.raises(TypeError, match="expected a JacobianLens of transformer_lens"):
        JacobianLens.of(jacobian_lens(model, TEXTS), model)
    unnamed = TheirLens(theirs.jacobians, n_prompts=3, d_model=families.D_MODEL)
    assert JacobianLens.of(unnamed, model, TEXTS).layers == (0, 1)
    other = families.build("mistral", "bridge")
    with pytest.raises(ValueError, match="fitted to model_name"):
        JacobianLens.of(theirs, other, TEXTS)
    with pytest.raises(ValueError, match="fitted to another model, or to other weights"):
        JacobianLens.of(unnamed, other, TEXTS)
    renewed = families.copied(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in renewed.parameters():
            parameter.normal_(std=0.3, generator=generator)
    with pytest.raises(ValueError, match="other weights of it"):
        JacobianLens.of(theirs, renewed, TEXTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lens: lens.metadata.update(target_layer=0), "carries to layer 0; expected the last"),
        (lambda lens: lens.metadata.update(model_name="tiny/other"), "fitted to model_name 'tiny/other'"),
        (lambda lens: lens.jacobians.update({1: lens.jacobians[0]}), "holds layers"),
        (lambda lens: lens.jacobians.update({0: torch.eye(8)}), "of matrices"),
    ],
)
def test_what_its_papers_say_is_checked(model, theirs, change, message):
    altered = copy.deepcopy(theirs)
    change(altered)
    with pytest.raises(ValueError, match=message):
        JacobianLens.of(altered, model, TEXTS)
