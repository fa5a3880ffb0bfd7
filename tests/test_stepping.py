"""Sequences that are read piece by piece equal those that are read whole, with and without clamps."""

import pytest
import torch

from tl_flash import clamp, clamp_hooks
from tl_flash.clamps import Stepper, reads_its_cache, stepping

VALUES = {"L0N3": 6.0, "L1N5": -4.0}


@pytest.fixture(params=["bridge", "hooked"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokens(model):
    return torch.arange(5, 17) % model.cfg.d_vocab


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("positions", [None, "prompt", "generated", "last"])
def test_pieces_equal_the_whole(model, tokens, positions, cached, monkeypatch):
    monkeypatch.setattr(stepping, "reads_its_cache", lambda _: cached)
    n_prompt, n = 8, len(tokens)
    stepper = Stepper(model, clamp_hooks(VALUES, positions=positions, model=model))
    pieces = [tokens[:n_prompt], *tokens[n_prompt:].split(1)]
    logits = torch.cat([stepper.read(piece) for piece in pieces])
    where = {None: None, "prompt": range(n_prompt), "generated": range(n_prompt, n), "last": range(n_prompt - 1, n)}
    with torch.no_grad(), clamp(model, VALUES, positions=where[positions]):
        whole = model(tokens[None])[0]
    assert torch.allclose(logits, whole, atol=1e-4)


def test_two_take_turns_on_one_model(model, tokens):
    plain, clamped = Stepper(model), Stepper(model, clamp_hooks(VALUES, model=model))
    turns = [(plain.read(piece), clamped.read(piece)) for piece in tokens.split(4)]
    a, b = (torch.cat(each) for each in zip(*turns, strict=True))
    with torch.no_grad():
        assert torch.allclose(a, model(tokens[None])[0], atol=1e-4)
        with clamp(model, VALUES):
            assert torch.allclose(b, model(tokens[None])[0], atol=1e-4)
    assert not torch.allclose(a, b, atol=1e-2)


def test_the_cache_is_used_where_the_model_reads_it(model, tokens):
    widths = []
    stepper = Stepper(model, [("blocks.0.hook_resid_pre", lambda act, hook: widths.append(act.shape[1]))])
    for piece in tokens.split(4):
        stepper.read(piece)
    assert widths == ([4, 4, 4] if reads_its_cache(model) else [4, 8, 12])


def test_hooks_are_there_only_while_it_reads(model, tokens):
    stepper = Stepper(model, clamp_hooks(VALUES, model=model))
    stepper.read(tokens)
    with torch.no_grad():
        assert torch.equal(model(tokens[None]), model(tokens[None]))
        assert torch.allclose(model(tokens[None])[0], Stepper(model).read(tokens), atol=1e-4)
