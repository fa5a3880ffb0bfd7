"""What is generated is what Hugging Face's own model generates, also where a bridge forgets its KV cache."""

import pytest
import torch

from tests import families
from tl_flash import clamp, dose_window, mention_rate
from tl_flash.clamps import complete_text, reads_its_cache

PROMPT, N_NEW = "the dog saw a cat", 8
SURFACES = [surface for surface in families.surfaces() if surface != "hf"]


def by_hugging_face(name, tokens):
    """Greedy, by the whole sequence at every step."""
    tokenizer, model, start = families.tokenizer(), families.hf_model(name), tokens.shape[1]
    for _ in range(N_NEW):
        with torch.no_grad():
            following = model(tokens).logits[0, -1].argmax()
        tokens = torch.cat([tokens, following.view(1, 1)], dim=1)
        if following == 1:
            break
    return tokenizer.decode(tokens[0, start:], skip_special_tokens=True)


def forgetful(name, monkeypatch):
    """A bridge whose attention drops the cache that it is handed."""
    if not families.HAS_BRIDGE:
        pytest.skip("TransformerLens 2 has no bridges")
    model = families.copied(families.build(name, "bridge"))
    for block in model.blocks:
        monkeypatch.setattr(type(block.attn), "_update_kv_cache", lambda self, k, v, **_: (k, v))
    return model


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("name", families.DENSE)
def test_completions_are_hugging_faces(name, surface):
    model = families.build(name, surface)
    assert complete_text(model, PROMPT, N_NEW) == by_hugging_face(name, model.to_tokens(PROMPT))


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("name", families.DENSE)
def test_these_libraries_read_the_cache(name, surface):
    assert reads_its_cache(families.build(name, surface))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_a_model_that_forgets_its_cache_generates_without_one(name, monkeypatch):
    model = forgetful(name, monkeypatch)
    assert not reads_its_cache(model)
    with torch.no_grad():
        tokens = model.to_tokens(PROMPT)
        forgets = model.generate(tokens, max_new_tokens=N_NEW, do_sample=False, verbose=False, return_type="tokens")
        text = model.tokenizer.decode(forgets[0, tokens.shape[1] :], skip_special_tokens=True)
    expected = by_hugging_face(name, tokens)
    assert text != expected, "the fault shows"
    assert complete_text(model, PROMPT, N_NEW) == expected
    rate = mention_rate(model, [PROMPT], "dog", {"L1N3": 0.0}, mode="add", max_new_tokens=N_NEW)
    assert rate.completions_before == rate.completions_after == (expected,)


def test_positions_refuse_a_cache_that_is_not_read(monkeypatch):
    model = forgetful("llama", monkeypatch)
    options = {"max_new_tokens": 3, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with (
        pytest.raises(RuntimeError, match="use_past_kv_cache=False"),
        clamp(model, {"L1N3": 4.0}, positions="generated"),
    ):
        model.generate(PROMPT, **options)
    with clamp(model, {"L1N3": 4.0}, positions="generated"):
        model.generate(PROMPT, use_past_kv_cache=False, **options)


@pytest.mark.parametrize("positions", ["prompt", "generated", "last", 0, [0, 1]], ids=str)
def test_prompts_of_one_token_may_follow_longer_ones(bridge, positions):
    prompts = [torch.tensor([3, 4, 5, 6]), torch.tensor([7])]
    options = dict(max_new_tokens=4, positions=positions)
    together = mention_rate(bridge, prompts, "dog", {"L1N3": 9.0}, **options)
    alone = [mention_rate(bridge, [prompt], "dog", {"L1N3": 9.0}, **options) for prompt in prompts]
    assert together.completions_after == tuple(rate.completions_after[0] for rate in alone)
    window = dose_window(bridge, {"L1N3": 9.0}, prompts, "dog", doses=[1.0], **options)
    assert window.completions[1] == together.completions_after
