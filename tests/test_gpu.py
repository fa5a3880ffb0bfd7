"""What a GPU is asked for: the engine's kernels as they run there, and every surface of the package on its memory.

Skipped without one. What a CPU answers is the truth here: other tests hold it against float64.
"""

import warnings

import pytest
import torch

from tests import families
from tl_flash import (
    activation_stats,
    check_lens,
    clamp,
    clamp_hooks,
    clamp_sweep,
    concepts,
    decode_directions,
    demo,
    dose_window,
    explain,
    find_neurons,
    flash_decode,
    jacobian_lens,
    kernel,
    mention_rate,
    validate,
)
from tl_flash.kernel import decode
from tl_flash.kernel import streaming as kernel_streaming

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STATISTICS = {"logits": 2e-5, "log_z": 1e-3, "norm": 1e-6, "mean": 1e-5, "std": 1e-5, "kurtosis": 1e-3, "tracked": 1e-5}
FLOAT_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PROMPTS = ["From my experience,", "Let me tell you about the"]


@pytest.fixture(scope="module")
def here():
    return demo.load("base")


@pytest.fixture(scope="module")
def there():
    return demo.load("base").to("cuda")


@pytest.fixture(scope="module")
def neuron(here):
    return str(find_neurons(here, "dog", side="out", progress=False)[0].neuron)


def draw(n, d_model, d_vocab, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, W_U = (torch.randn(*shape, generator=generator) for shape in ((n, d_model), (d_model, d_vocab)))
    return x.to(dtype), (W_U / d_model**0.5).to(dtype), torch.rand(d_model, generator=generator) + 0.5


def assert_same(there, here):
    assert torch.equal(there.ids, here.ids)
    for name, tolerance in STATISTICS.items():
        got, expected = getattr(there, name), getattr(here, name)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


# The engine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("n", [3, 300])
def test_it_names_the_tokens_that_a_cpu_names(n, dtype, score, by_token):
    x, W_U, gain = draw(n, 256, 20011, dtype)
    W_U = W_U.T.contiguous().T if by_token else W_U
    options = {"gain": gain, "centre": True, "score": score, "ignore": [5]}
    here = decode(x, kernel.prepare(W_U, **options), tracked=[1])
    there = decode(x, kernel.prepare(W_U, device="cuda", **options), tracked=[1])
    assert_same(there, here)


def test_rows_that_are_peaked_flat_huge_tiny_or_zero():
    x, W_U, _ = draw(520, 512, 30011)
    x[:64] = W_U[:, :64].T * 50
    x[64:128] *= torch.logspace(-20, 20, 64)[:, None]
    x[128] = 0
    W_U[:, 20000:20100] = W_U[:, 19999:20000]  # which no rounding tells apart
    here, there = (decode(x, kernel.prepare(W_U, device=device)) for device in ("cpu", "cuda"))
    assert_same(there, here)


def test_the_host_does_not_wait_before_a_layer_is_queued(monkeypatch):
    x, W_U, _ = draw(300, 256, 20011)
    unembedding = kernel.prepare(W_U, device="cuda")
    decode(x, unembedding)  # kernels are compiled
    queue = kernel_streaming._decode

    def watched(*args):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it may not see every wait
                torch.cuda.set_sync_debug_mode("error")
            return queue(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(kernel_streaming, "_decode", watched)
    assert decode(x.cuda(), unembedding).ids.shape == (2, 300, 10)


@pytest.mark.parametrize("held", ["cpu", "cuda"])
def test_many_tiles_from_either_memory(held):
    x, W_U, _ = draw(5000, 256, 20011)
    there = decode(x.to(held), kernel.prepare(W_U, device="cuda"), max_bytes=2**26)
    some = slice(4000, 4500)
    assert torch.equal(there.ids[:, some], decode(x[some], kernel.prepare(W_U)).ids)


# Maps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", families.surfaces())
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_surface(name, surface):
    model = families.build(name, surface)
    tokenizer = families.tokenizer() if surface == "hf" else None
    right = flash_decode(model, tokenizer=tokenizer)
    moved = families.copied(model).to("cuda")
    for found in (flash_decode(moved, tokenizer=tokenizer), flash_decode(model, tokenizer=tokenizer, device="cuda")):
        assert torch.equal(found.positive.ids, right.positive.ids) and torch.equal(
            found.negative.ids, right.negative.ids
        )
        torch.testing.assert_close(found.positive.z, right.positive.z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["in", "out"])
def test_the_embedded_model(here, there, side):
    found, right = flash_decode(there, side=side), flash_decode(here, side=side)
    assert torch.equal(found.positive.ids, right.positive.ids)
    torch.testing.assert_close(found.positive.write_z, right.positive.write_z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.positive.log_z, right.positive.log_z, rtol=1e-3, atol=1e-3)
    assert {hit.neuron for hit in found.specialised(20)} == {hit.neuron for hit in right.specialised(20)}


def test_a_checkpoint_is_decoded_there():
    folder = demo.path("base")
    assert torch.equal(flash_decode(folder, device="cuda").positive.ids, flash_decode(folder).positive.ids)


def test_directions_are_read_there(there):
    x = torch.randn(5, there.cfg.d_model)
    right = decode_directions(x, demo.load("base"))
    for given in (x, x.cuda(), x.numpy()):
        assert torch.equal(decode_directions(given, there).positive.ids, right.positive.ids)


@pytest.mark.parametrize("side", ["in", "out"])
def test_concepts_are_found_there(here, there, side):
    found, right = (find_neurons(model, "dog", side=side, related=2) for model in (there, here))
    assert found[0].neuron == right[0].neuron
    assert found[0].z == pytest.approx(right[0].z, abs=1e-3)
    assert found[0].p_value == pytest.approx(right[0].p_value, rel=0.3, abs=1e-6)
    assert len(concepts(there, ["dog", "river"]).to_frame())


# Lenses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mean_field", "exact", "mixed"])
def test_lenses_are_made_there(here, there, method):
    texts = demo.texts(3)
    options = {"exact_prompts": 3} if method == "mixed" else {}
    found, right = (jacobian_lens(model, texts, method=method, **options) for model in (there, here))
    torch.testing.assert_close(found.J.cpu(), right.J, rtol=1e-3, atol=1e-3)
    map = flash_decode(there, side="out", lens=found)
    assert torch.equal(map.positive.ids[:, :, 0], flash_decode(here, side="out", lens=found).positive.ids[:, :, 0])


@pytest.mark.parametrize("name", families.DENSE)
@pytest.mark.parametrize("surface", families.loaded_surfaces())
def test_the_mean_field_lens_of_every_family(name, surface):
    model = families.build(name, surface)
    rows = torch.randint(2, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    right, found = jacobian_lens(model, rows), jacobian_lens(families.copied(model).to("cuda"), rows.cuda())
    torch.testing.assert_close(found.J.cpu(), right.J, rtol=1e-3, atol=1e-3)


def test_a_lens_is_checked_there(here, there):
    texts = demo.texts(12)
    lens = jacobian_lens(here, texts[:6])
    found, right = (check_lens(model, lens, texts[6:], n=4, doses=[5.0]) for model in (there, here))
    assert (found["correlation"] - right["correlation"]).abs().max() < 0.01


# Clamps and evidence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["set", "add", "multiply", "floor", "ceil"])
def test_clamps_act_there(here, there, neuron, mode):
    logits = []
    for model in (here, there):
        with clamp(model, {neuron: 3.0}, mode=mode, positions="last"):
            logits.append(model(PROMPTS[0]).detach().cpu())
        hooked = model.run_with_hooks(PROMPTS[0], fwd_hooks=clamp_hooks({neuron: 3.0}, mode=mode, positions="last"))
        torch.testing.assert_close(hooked.detach().cpu(), logits[-1])
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_a_clamp_to_a_tensor_of_either_memory(there, neuron):
    values = torch.tensor([2.0])
    for given in (values, values.cuda()):
        with clamp(there, {neuron: given}):
            assert there(PROMPTS[0]).isfinite().all()


def test_activations_are_measured_there(here, there, neuron):
    found, right = (activation_stats(model, PROMPTS) for model in (there, here))
    assert found[neuron].abs_max == pytest.approx(right[neuron].abs_max, rel=1e-3)


def test_doses_are_swept_there(here, there, neuron):
    found, right = (clamp_sweep(model, neuron, [0, 4, 8], PROMPTS, [" dog"]).to_frame() for model in (there, here))
    for name in right.select_dtypes("number"):
        assert found[name].to_numpy() == pytest.approx(right[name].to_numpy(), rel=0.01, abs=0.01, nan_ok=True), name


def test_mentions_and_dose_windows_are_found_there(here, there, neuron):
    for model in (here, there):
        assert len(mention_rate(model, PROMPTS, "dog", {neuron: 8.0}, max_new_tokens=6).to_frame())
    found, right = (dose_window(model, {neuron: 8.0}, PROMPTS, "dog", max_new_tokens=6) for model in (there, here))
    torch.testing.assert_close(found.doses, right.doses)
    assert found.completions == right.completions


def test_labels_are_tested_there(here, there):
    map = flash_decode(here, side="out")
    found, right = (validate(model, map, n=4, controls=3, prompts=PROMPTS) for model in (there, here))
    effects = [each.to_frame().select_dtypes("number") for each in (found, right)]
    for name in effects[1]:
        assert effects[0][name].to_numpy() == pytest.approx(
            effects[1][name].to_numpy(), rel=0.02, abs=0.02, nan_ok=True
        ), name


@pytest.mark.parametrize("rule", ["gradient", "frozen", "relp"])
def test_a_prediction_is_explained_there(here, there, rule):
    found, right = (explain(model, PROMPTS[1], rule=rule, n=5) for model in (there, here))
    assert found.to_frame()["neuron"].tolist() == right.to_frame()["neuron"].tolist()
