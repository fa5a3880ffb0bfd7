"""From a prompt to its neurons: what is attributed adds up, is a derivative, and is what hooks by hand measure."""

import copy
import json

import pytest
import torch

from tests import families
from tl_flash import Explanation, activation_stats, clamp, explain
from tl_flash.clamps import Prompts, attached, clamp_spots
from tl_flash.evidence.attribution import Target, attribute
from tl_flash.evidence.curve import Curve
from tl_flash.lens import linearised
from tl_flash.weights import measuring, read

PROMPT = "the dog saw a cat"
SURFACES = [surface for surface in families.surfaces() if surface != "hf"]
FAMILIES = ("llama", "gpt2", "gemma3", "olmo2")


@pytest.fixture(scope="module", params=["bridge", "hooked"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def explained(model):
    return explain(model, PROMPT, n=12)


@pytest.fixture(scope="module")
def wide(model):
    """The model in float64."""
    return copy.deepcopy(model).to(torch.float64)


def row_of(model, prompt=PROMPT):
    return Prompts.of(model, [prompt]).rows[0]


def score_of(model, target, row):
    with measuring(model):
        return float(target.score(model(row[None]))[0, -1])


def test_what_is_attributed_adds_up_to_the_logit(wide):
    """A Llama has no biases: by rule "relp" the stream carries the whole logit past every layer."""
    seen = attribute(wide, row_of(wide), None, None, "relp")
    torch.testing.assert_close(seen.flow, torch.full_like(seen.flow, seen.score), rtol=1e-6, atol=1e-6)
    entered, left = seen.stream[:-1], seen.stream_grad[1:]
    passed_by = (entered * left).sum((1, 2))
    for layer, block in enumerate(wide.blocks):
        written = seen.act[layer] @ block.mlp.W_out.detach()
        of_neurons = seen.strength(torch.zeros(2, families.D_MLP))[layer].sum()
        of_mlp = (written * left[layer]).sum()
        of_attention = ((seen.stream[layer + 1] - entered[layer] - written) * left[layer]).sum()
        torch.testing.assert_close(of_neurons, of_mlp, rtol=1e-6, atol=1e-6)
        parts = passed_by[layer] + of_attention + of_neurons
        assert float(parts) == pytest.approx(seen.score, rel=1e-6)
    plain = attribute(wide, row_of(wide), None, None, "gradient")
    assert (plain.flow - plain.score).abs().max() > 0.1, "the plain gradient does not add up"


def test_with_biases_it_adds_up_to_what_is_not_theirs():
    model = copy.deepcopy(families.build("gpt2", "hooked-raw" if families.HAS_HOOKED_TRANSFORMER else "bridge"))
    model = model.to(torch.float64)
    row = row_of(model)
    seen = attribute(model, row, None, None, "relp")
    assert abs(float(seen.flow[0]) - seen.score) > 1e-3
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-1].startswith("b_") or name.endswith((".b", ".bias")):
                parameter.zero_()
    seen = attribute(model, row, None, None, "relp")
    torch.testing.assert_close(seen.flow, torch.full_like(seen.flow, seen.score), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("against", [None, 7])
def test_attributions_are_finite_differences(wide, against):
    row = row_of(wide)
    seen = attribute(wide, row, None, against, "gradient")
    assert seen.score == pytest.approx(score_of(wide, seen.target, row))
    strength = seen.strength(torch.zeros(2, families.D_MLP))
    # Behind a bridge Hugging Face's RMSNorm computes in float32, which small steps drown in.
    steps, noise = ((0.1, 0.01), 1e-3) if hasattr(wide, "original_model") else ((1e-2, 1e-4), 1e-7)
    for layer, position, index in ((0, 2, 7), (1, 5, 3), (0, 5, 11), (1, 0, 40)):
        errors = []
        for step in steps:
            where = torch.zeros(1, 2, len(row), families.D_MLP, dtype=torch.bool)
            where[0, layer, position, index] = True
            values = torch.zeros(2, families.D_MLP, dtype=torch.float64)
            values[layer, index] = seen.act[layer, position, index] * (1 - step)
            with clamp_spots(wide, where, values):
                moved = score_of(wide, seen.target, row)
            errors.append(abs((seen.score - moved) / step - float(strength[layer, position, index])))
        assert errors[1] < max(2 * errors[0] * steps[1] / steps[0], noise)


@pytest.mark.parametrize("rule", ["frozen", "relp"])
def test_a_rule_changes_no_output(wide, rule):
    row = row_of(wide)
    with torch.no_grad():
        expected = wide(row[None])
        with linearised(wide, row, rule):
            torch.testing.assert_close(wide(row[None]), expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(wide(row[None]), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("surface", SURFACES)
def test_it_works_on_every_surface_and_they_agree(family, surface):
    model, truth = families.build(family, surface), families.build(family, "hf")
    found = explain(model, PROMPT, n=5, rule="relp", token=5)
    with torch.no_grad():
        logits = truth(row_of(model)[None]).logits[0, -1]
    assert found.logit == pytest.approx(float(logits[5] - logits.mean()), abs=1e-3)
    plain = explain(model, PROMPT, n=5, token=5)
    for one in plain:
        with clamp(model, {one.neuron: 0.0}, positions=one.position):
            effect = score_of(model, Target(5), row_of(model)) - plain.logit
        assert one.effect == pytest.approx(effect, abs=1e-4)
    assert abs(plain[0].effect) >= abs(plain[4].effect)


def test_the_result_is_what_a_hook_by_hand_would_say(model, explained):
    weights, row = read(model), row_of(model)
    with torch.no_grad():
        logits, cache = model.run_with_cache(row[None])
    last = logits[0, -1]
    assert explained.token_id == int(last.argmax())
    assert explained.logit == pytest.approx(float(last.max() - last.mean()), abs=1e-4)
    assert explained.prob == pytest.approx(float(last.softmax(-1).max()), abs=1e-5)
    assert "".join(explained.prompt).endswith(PROMPT)
    W_U = weights.W_U if weights.final_gain is None else weights.W_U * weights.final_gain[:, None]
    for one in explained:
        layer, index = one.neuron
        act = cache[f"blocks.{layer}.mlp.hook_post"][0, one.position, index]
        assert one.activation == pytest.approx(float(act), abs=1e-5) and one.position > 0
        scores = weights.directions(layer, "out")[index] @ W_U
        scores = scores - scores.mean()
        assert one.write_z == pytest.approx(float(scores[explained.token_id] / scores.std(correction=0)), abs=1e-3)
        named = [weights.vocab.string(id) for id in range(families.N_TOKENS)]
        assert one.label_out == named[int((scores * act.sign())[: families.N_TOKENS].argmax())]


def test_those_named_come_first_by_what_was_measured(explained):
    effects = [abs(one.effect) for one in explained]
    assert effects == sorted(effects, reverse=True) and effects[-1] > 0
    assert not any(one.control_effect == one.effect for one in explained)
    frame = explained.to_frame()
    assert list(frame["neuron"]) == [str(one.neuron) for one in explained]
    assert {"neuron", "position", "at", "activation", "attribution", "share", "effect", "label_in", "label_out"} <= set(
        frame
    )
    assert sum(abs(one.share) for one in explained) < 1


def test_without_measuring_the_order_is_that_of_the_attributions(model):
    found = explain(model, PROMPT, n=6, measure=False)
    gives = [abs(one.attribution) for one in found]
    assert gives == sorted(gives, reverse=True) and found.curve is None
    assert all(one.effect != one.effect and one.level != one.level for one in found), "NaN: not measured"
    assert "effect" not in str(found) and "restore" not in str(found)
    every = explain(model, PROMPT, n=2 * 5 * families.D_MLP, measure=False)
    assert sum(abs(one.share) for one in every) == pytest.approx(1)
    assert every.places.sum() == pytest.approx(sum(one.attribution for one in every), abs=1e-3)


def test_the_beginning_of_the_sequence_is_left_out(model):
    with_it = explain(model, PROMPT, n=2 * 6 * families.D_MLP, measure=False, include_bos=True)
    assert {one.position for one in with_it} == set(range(6))
    with pytest.raises(ValueError, match="n: expected 1 to 520"):
        explain(model, PROMPT, n=521, measure=False)


def test_a_mean_may_be_the_reference(model):
    stats = activation_stats(model, ["a dog ran", "the cat and a dog"])
    found = explain(model, PROMPT, n=4, reference="mean", stats=stats)
    row = row_of(model)
    for one in found:
        with clamp(model, {one.neuron: stats[one.neuron].mean}, positions=one.position):
            assert one.effect == pytest.approx(score_of(model, Target(found.token_id), row) - found.logit, abs=1e-4)
        assert 0 <= one.level <= 1
    with pytest.raises(ValueError, match="stats: expected all 2 layers"):
        explain(model, PROMPT, stats=activation_stats(model, ["a dog"], layers=[1]))


def test_the_curve_ends_where_it_should(model, explained):
    curve = explained.curve
    assert curve.counts[0] == 1 and curve.counts[-1] == 520
    assert curve.whole == pytest.approx(explained.logit)
    assert float(curve.faithfulness[-1]) == pytest.approx(1, abs=1e-4)
    assert float(curve.completeness[-1]) == pytest.approx(0, abs=1e-4)
    every = explain(model, PROMPT, n=520, measure=False)
    first = max(every, key=lambda one: one.attribution)
    with clamp(model, {first.neuron: 0.0}, positions=first.position):
        assert float(curve.removed[0]) == pytest.approx(
            score_of(model, Target(explained.token_id), row_of(model)), abs=1e-4
        )

    def nothing(act, hook):
        act = act.clone()
        act[:, 1:] = 0
        return act

    with attached(model, [(f"blocks.{layer}.mlp.hook_post", nothing) for layer in range(2)]):
        assert score_of(model, Target(explained.token_id), row_of(model)) == pytest.approx(curve.none, abs=1e-4)
    areas = curve.areas()
    assert areas["kept"] > areas["kept_random"] and areas["removed"] < areas["removed_random"]


def test_how_few_suffice():
    kept, removed = torch.tensor([1.0, 4.4, 5.0]), torch.tensor([4.0, 2.0, 1.0])
    curve = Curve((1, 10, 100), 5.0, 1.0, kept, removed, torch.tensor([1.0, 1.0, 5.0]), torch.tensor([5.0, 5.0, 1.0]))
    assert curve.faithfulness.tolist() == pytest.approx([0, 0.85, 1]) and curve.suffices(0.8) == 10
    assert curve.suffices(0.9) == curve.suffices(random=True) == 100 and curve.suffices(0) == 1
    by_luck = Curve((1, 10, 100), 5.0, 1.0, torch.tensor([4.9, 1.0, 5.0]), removed, kept, kept)
    assert by_luck.suffices() == 100
    assert curve.areas() == pytest.approx(
        {"kept": 0.675, "removed": 0.3125, "kept_random": 0.25, "removed_random": 0.75}
    )


def test_it_is_plain_data(explained):
    plain = json.loads(json.dumps(explained.to_dict(), allow_nan=False))
    assert plain["token"] == explained.token and plain["neurons"][0]["neuron"] == str(explained[0].neuron)
    assert plain["curve"]["count"][-1] == 520 and len(plain["places"][0]) == len(plain["prompt"])
    assert isinstance(explained, Explanation) and "<table" in explained._repr_html_()
    assert str(explained[0].neuron) in str(explained) and "restore 80%" in str(explained)


def test_a_token_may_be_set_against_another(model):
    found = explain(model, PROMPT, token=" dog", against=" cat", n=3)
    vocab = read(model).vocab
    with torch.no_grad():
        last = model(row_of(model)[None])[0, -1]
    assert found.logit == pytest.approx(float(last[vocab.id(" dog")] - last[vocab.id(" cat")]), abs=1e-4)
    assert " against ' cat'" in str(found)


def test_token_ids_and_a_lens_are_taken(model):
    ids = row_of(model)
    by_text, by_ids = (explain(model, prompt, n=3, measure=False, lens="auto") for prompt in (PROMPT, ids))
    assert [one.neuron for one in by_text] == [one.neuron for one in by_ids] and by_text.lens is not None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"token": " no such token"}, "expected one token of the vocabulary"),
        ({"token": " dog", "against": " dog"}, "against: expected another token"),
        ({"rule": "lrp"}, "rule: expected one of"),
        ({"reference": "median"}, 'reference: expected "zero" or "mean"'),
        ({"n": 0}, "n: expected 1 to 520"),
    ],
)
def test_what_is_wrong_is_refused(model, asked, message):
    with pytest.raises(ValueError, match=message):
        explain(model, PROMPT, **asked)


def test_arguments_of_another_kind_are_refused(model):
    with pytest.raises(TypeError, match="stats: expected what activation_stats gives, got int"):
        explain(model, torch.tensor([1, 2]), stats=3)
    with pytest.raises(ValueError, match="batch_size: expected a whole number, 1 or more, got 0"):
        explain(model, torch.tensor([1, 2]), batch_size=0)


def test_prompts_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match=f"at most n_ctx = {families.N_CTX} tokens"):
        explain(model, "dog " * families.N_CTX)
    with pytest.raises(ValueError, match="prompt: expected one, got 2"):
        explain(model, torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="boot_transformers"):
        explain(families.build("llama", "hf"), PROMPT)


@pytest.mark.parametrize("surface", SURFACES)
def test_experts_are_refused_by_name(surface):
    model = families.build("mixtral", surface)
    with pytest.raises(ValueError, match="layer 0 has no dense MLP.*mixture of experts"):
        explain(model, PROMPT)


def test_a_block_of_another_make_is_refused_by_rule(model):
    """An attention that adds what no pattern tells."""
    changed = copy.deepcopy(model)
    attention = changed.blocks[1].attn
    handle = attention.register_forward_hook(
        lambda module, args, output: (output[0].tanh(), *output[1:]) if isinstance(output, tuple) else output.tanh()
    )
    with pytest.raises(ValueError, match='layer 1 is not made of .* use rule="gradient"'):
        explain(changed, PROMPT, rule="relp", measure=False)
    assert explain(changed, PROMPT, measure=False, n=2)[0].neuron
    handle.remove()


def test_the_model_is_left_as_it_was(model):
    row = row_of(model)
    with torch.no_grad():
        before = model(row[None])
        points = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
        explain(model, PROMPT, n=2, rule="relp")
        assert torch.equal(model(row[None]), before)
    assert points == {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_spots_that_do_not_fit_are_refused(model):
    where = torch.ones(1, 2, 3, families.D_MLP, dtype=torch.bool)
    with pytest.raises(ValueError, match="where: expected"), clamp_spots(model, where, torch.zeros(2, families.D_MLP)):
        model(row_of(model)[None])


def test_what_is_scored():
    logits = torch.tensor([1.0, 5.0, 3.0])
    assert float(Target(1).score(logits)) == 2 and float(Target(1, 2).score(logits)) == 2
