import pytest
import torch

from tl_flash import clamp, clamp_sweep, mention_rate
from tl_flash.clamps import complete_text
from tl_flash.evidence import mentions

PROMPTS = ["a dog", "the cat and a dog ran"]


@pytest.fixture(scope="module", params=["bridge", "hooked"])
def model(request):
    return request.getfixturevalue(request.param)


def test_a_sweep_is_what_clamps_give_one_by_one(model):
    curve = clamp_sweep(model, "L1N3", [-4.0, 0.0, 9.0], PROMPTS, [" dog", 5])
    assert curve.prob.shape == curve.rank.shape == (3, 2, 2) and curve.tokens[0] == " dog"
    for i, value in enumerate(curve.values.tolist()):
        for j, prompt in enumerate(PROMPTS):
            with clamp(model, {"L1N3": value}), torch.no_grad():
                probs = model(model.to_tokens(prompt))[0, -1].float().softmax(-1)
            assert torch.allclose(
                curve.prob[i, j], probs[[model.tokenizer.convert_tokens_to_ids("Ġdog"), 5]], rtol=1e-3
            )
            assert curve.rank[i, j, 1] == int((probs > probs[5]).sum())
    with torch.no_grad():
        probs = model(model.to_tokens(PROMPTS[0]))[0, -1].float().softmax(-1)
    assert float(curve.unclamped_prob[0, 1]) == pytest.approx(float(probs[5]), rel=1e-3)


def test_a_sweep_as_a_frame(model):
    curve = clamp_sweep(model, (1, 3), [0.0, 9.0], PROMPTS, [" dog"])
    frame = curve.to_frame()
    assert len(frame) == 3 and frame["value"].isna().sum() == 1
    assert list(frame["prob"][1:]) == pytest.approx(curve.prob[:, :, 0].mean(1).tolist())
    assert ((frame["prob_low"] <= frame["prob"]) & (frame["prob"] <= frame["prob_high"])).all()
    assert "unclamped" in str(curve) and "' dog'" in str(curve)


def test_last_positions_move_less_than_all(model):
    everywhere = clamp_sweep(model, "L0N3", [9.0], PROMPTS, [5])
    last = clamp_sweep(model, "L0N3", [9.0], PROMPTS[:1], [5], positions="last")
    assert float((everywhere.prob[0, 0, 0] - last.prob[0, 0, 0]).abs()) > 0


def test_the_last_position_of_a_short_prompt_is_its_own(model):
    together = clamp_sweep(model, "L0N3", [9.0], PROMPTS, [5], positions="last")
    alone = [clamp_sweep(model, "L0N3", [9.0], [prompt], [5], positions="last") for prompt in PROMPTS]
    assert torch.allclose(together.prob[0, :, 0], torch.stack([one.prob[0, 0, 0] for one in alone]), rtol=1e-4)


def test_wrong_sweeps_are_refused(model):
    with pytest.raises(ValueError, match="values: expected"):
        clamp_sweep(model, "L1N3", [], PROMPTS, [5])
    with pytest.raises(ValueError, match="tokens: expected"):
        clamp_sweep(model, "L1N3", [1.0], PROMPTS, [])
    with pytest.raises(ValueError, match="finite"):
        clamp_sweep(model, "L1N3", [float("nan")], PROMPTS, [5])
    with pytest.raises(ValueError, match="layer"):
        clamp_sweep(model, "L9N3", [1.0], PROMPTS, [5])


@pytest.mark.parametrize("text", ["Dogs are fun.", "a dog!", "A DOG.", "dogma, dog"])
def test_a_mention(text):
    assert mentions(text, "dog")


@pytest.mark.parametrize("text", ["", "the hotdog", "dogma", "underdogs", "a cat"])
def test_no_mention(text):
    assert not mentions(text, "dog")


def test_a_clamp_changes_what_is_said(model):
    rate = mention_rate(model, PROMPTS, "dog", {"L1N3": 60.0}, max_new_tokens=6)
    assert rate.completions_before == tuple(complete_text(model, prompt, 6) for prompt in PROMPTS)
    with clamp(model, {"L1N3": 60.0}):
        assert rate.completions_after == tuple(complete_text(model, prompt, 6) for prompt in PROMPTS)
    assert rate.completions_after != rate.completions_before
    assert 0 <= rate.before <= 1 and len(rate.to_frame()) == 2 and "before" in str(rate)


def test_draws_are_seeded(model):
    def draw(seed):
        return complete_text(model, "a dog", 8, do_sample=True, seed=seed)

    state = torch.random.get_rng_state()
    assert draw(1) == draw(1) and len({draw(seed) for seed in range(5)}) > 1
    assert torch.equal(torch.random.get_rng_state(), state), "the user's generator is left alone"


def test_wrong_questions_are_refused(model):
    with pytest.raises(TypeError, match="a list of strings"):
        mention_rate(model, "a dog", "dog", {"L1N3": 1.0})
    with pytest.raises(ValueError, match="at least one"):
        mention_rate(model, [], "dog", {"L1N3": 1.0})
    with pytest.raises(ValueError, match="word"):
        mention_rate(model, PROMPTS, " ", {"L1N3": 1.0})


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("Dogs.", "dog", True),
        ("A hotdog, dogged", "dog", False),
        ("my dog_house", "dog", False),
        ("我最喜欢的动物是狗，因为", "狗", True),
        ("我最喜欢猫", "狗", False),
        ("私の好きな動物は犬です", "犬", True),
        ("いぬがすき", "いぬ", True),
        ("ホットドッグ", "ドッグ", True),
        ("ฉันชอบสุนัขมาก", "สุนัข", True),
        ("나는 강아지를 좋아해", "강아지", True),
        ("불강아지", "강아지", False),
        ("I like C++.", "C++", True),
        ("C++11 is", "C++", True),
        ("ABC++", "C++", False),
        ("It costs $5", "$", True),
        ("in New\nYork now", "New York", True),
        ("in Newer York", "New York", False),
        ("New Yorkers", "New York", False),
        ("Собаки и собака", "собака", True),
        ("собакам", "собака", False),
        ("कीमत", "की", False),
        ("राम की किताब", "की", True),
        ("cafe\u0301 noir", "caf\u00e9", True),
        ("the iPhone狗", "iphone", True),
        ("a cat, then", "cat's", False),
        ("the cat's toy", "cat", True),
    ],
)
def test_a_word_is_found_as_its_script_writes_words(text, word, found):
    assert mentions(text, word) is found
