import pytest
import torch

from tl_flash.clamps import NEUTRAL_PROMPTS, Answers, Prompts


def test_a_batch_gives_what_each_prompt_gives_alone(bridge):
    prompts = Prompts.of(bridge, ["dog", "a dog and a cat", "cat dog"])
    together, alone = Answers.of(bridge, prompts), Answers.of(bridge, prompts, batch_size=1)
    assert len({len(row) for row in prompts.rows}) > 1, "else no padding is tested"
    for name in ("logits", "log_probs", "nll"):
        assert torch.allclose(getattr(together, name), getattr(alone, name), atol=1e-5)


def test_answers_are_the_models_own(bridge):
    tokens = bridge.to_tokens("a dog and a cat")
    answers = Answers.of(bridge, Prompts.of(bridge, ["a dog and a cat"]))
    logits = bridge(tokens)[0].detach()
    assert torch.allclose(answers.log_probs[0], logits[-1].log_softmax(-1), atol=1e-5)
    own = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
    assert answers.nll[0] == pytest.approx(float(own), rel=1e-4)
    assert float(answers.logits.mean().abs()) < 1e-5
    assert answers.ranks(int(logits[-1].argmax())).tolist() == [0]


def test_token_ids_are_prompts_too(bridge):
    tokens = bridge.to_tokens("a dog")
    given = Answers.of(bridge, Prompts.of(bridge, tokens))
    assert torch.equal(given.logits, Answers.of(bridge, Prompts.of(bridge, ["a dog"])).logits)


def test_wrong_prompts_are_refused(bridge):
    with pytest.raises(TypeError, match=r"write \['a dog'\]"):
        Prompts.of(bridge, "a dog")
    with pytest.raises(TypeError, match="strings"):
        Prompts.of(bridge, [3])
    with pytest.raises(TypeError, match=r"\[prompt, position\]"):
        Prompts.of(bridge, torch.zeros(3))
    with pytest.raises(ValueError, match="at least one"):
        Prompts.of(bridge, [])
    with pytest.raises(ValueError, match="n_ctx"):
        Prompts.of(bridge, torch.zeros(1, bridge.cfg.n_ctx + 1, dtype=torch.long))
    with pytest.raises(ValueError, match="batch_size"):
        Answers.of(bridge, Prompts.of(bridge, ["a dog"]), batch_size=0)


def test_there_are_twenty_neutral_prompts():
    assert len(set(NEUTRAL_PROMPTS)) == 20
