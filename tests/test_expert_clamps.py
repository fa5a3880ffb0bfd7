"""Neurons of experts are clamped where a hook reaches them, on the tokens that are routed there, and else refused."""

import pytest
import torch

from tests import families
from tl_flash import weights
from tl_flash.clamps import clamp, clamp_hooks

needs_hooked = pytest.mark.skipif(not families.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has none")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 70, (3, 5), generator=torch.Generator().manual_seed(0))


@needs_hooked
@pytest.mark.parametrize("at, hook", [("post", "hook_post"), ("up", "hook_pre"), ("gate", "hook_gate")])
def test_an_experts_neuron_is_held_on_the_tokens_that_are_routed_to_it(tokens, at, hook):
    model = families.build("mixtral", "hooked")
    name, seen = f"blocks.1.mlp.experts.2.{hook}", []
    handle = model.hook_dict[name]
    before = model(tokens)
    with clamp(model, {"L1E2N3": 8.0, "L1E2N5": -2.0}, at=at):
        after = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda act, hook: seen.append(act.clone()))])
    assert 0 < len(seen[0]) < tokens.numel() and bool((seen[0][:, 3] == 8).all() and (seen[0][:, 5] == -2).all())
    moved = (after - before).abs().amax(-1) > 1e-6
    assert not handle.fwd_hooks and moved.any() and torch.equal(model(tokens), before)


@needs_hooked
def test_what_a_clamped_neuron_of_an_expert_writes_is_its_direction(tokens):
    model = families.build("mixtral", "hooked")
    kept = []
    for clamped in ({"L1E2N3": 0.0}, {"L1E2N3": 100.0}):
        with clamp(model, clamped):
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda act, hook: kept.append(act))])
    effect = (kept[1] - kept[0]).flatten(0, 1)
    effect = effect[effect.norm(dim=-1).argmax()]
    written = weights.read(model).layer(1).W_out[2][3]
    assert torch.nn.functional.cosine_similarity(effect, written, dim=0) > 1 - 1e-6


@needs_hooked
@pytest.mark.parametrize(
    "neuron, options, message",
    [
        ("L1E9N3", {}, "expert 9: those of layer 1 that hooks reach are 0 to 3"),
        ("L1E2N99999", {}, "neuron L1E2N99999: expected an index below"),
        ("L1E2N3", {"positions": "last"}, "positions: L1E2N3 is an expert's"),
    ],
)
def test_what_cannot_be_clamped_of_an_expert_is_refused(tokens, neuron, options, message):
    with pytest.raises(ValueError, match=message), clamp(families.build("mixtral", "hooked"), {neuron: 1.0}, **options):
        pass


@needs_hooked
def test_a_value_for_each_position_does_not_fit_an_expert():
    model = families.build("mixtral", "hooked")
    with (
        pytest.raises(ValueError, match="value of L1E2N3: expected one number"),
        clamp(model, {"L1E2N3": torch.ones(4)}),
    ):
        pass


@needs_hooked
def test_a_clamp_of_an_expert_that_no_token_reaches_says_so():
    model = families.build("mixtral", "hooked")
    used = set()
    model.run_with_hooks(
        torch.tensor([[3]]),
        fwd_hooks=[("blocks.1.mlp.hook_expert_indices", lambda act, hook: used.update(act.flatten().tolist()))],
    )
    idle = next(expert for expert in range(4) if expert not in used)
    with pytest.raises(RuntimeError, match=f"no token was routed to expert {idle}"), clamp(model, {(1, idle, 3): 8.0}):
        model(torch.tensor([[3]]))


@pytest.mark.skipif(not families.HAS_BRIDGE, reason="TransformerLens 2 has none")
def test_an_experts_neuron_in_a_bridge_is_refused():
    model = families.build("mixtral", "bridge")
    with (
        pytest.raises(ValueError, match="layer 1: expected experts .* hooks of their own"),
        clamp(model, {"L1E2N3": 1.0}),
    ):
        pass
    with pytest.raises(ValueError, match="pass model="):
        clamp_hooks({"L1E2N3": 1.0})
