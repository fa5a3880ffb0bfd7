import pytest
import torch

from tl_flash import clamp
from tl_flash.clamps import Answers, Prompts, answers_alone, clamp_rows
from tl_flash.names import Neuron

PROMPTS = ["a dog", "the cat and a dog ran", "the red house", "a cat"]
DOSES = [(Neuron(0, 3), 6.0), (Neuron(1, 3), -6.0), (Neuron(0, 3), 0.0), (Neuron(1, 11), 9.0)]


@pytest.fixture(scope="module", params=["bridge", "hooked"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("positions", [None, 1, "last", "prompt"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_each_answer_is_that_of_one_clamp(model, positions, batch_size):
    prompts = Prompts.of(model, PROMPTS)
    answers = list(answers_alone(model, prompts, DOSES, positions=positions, batch_size=batch_size))
    assert len(answers) == len(DOSES)
    unclamped = Answers.of(model, prompts)
    for (neuron, value), answer in zip(DOSES, answers, strict=True):
        with clamp(model, {neuron: value}, positions=positions):
            expected = Answers.of(model, prompts)
        torch.testing.assert_close(answer.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(answer.nll, expected.nll, atol=1e-5, rtol=1e-5)
        if positions is None:
            assert (answer.logits - unclamped.logits).abs().max() > 1e-3


def test_values_may_be_added(model):
    prompts = Prompts.of(model, PROMPTS)
    for (neuron, value), answer in zip(DOSES, answers_alone(model, prompts, DOSES, mode="add"), strict=True):
        with clamp(model, {neuron: value}, mode="add"):
            expected = Answers.of(model, prompts)
        torch.testing.assert_close(answer.logits, expected.logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="mode: expected one of"):
        list(answers_alone(model, prompts, DOSES, mode="double"))


def test_few_answers_are_held_at_a_time(model, monkeypatch):
    prompts = Prompts.of(model, PROMPTS)
    expected = [answer.logits for answer in answers_alone(model, prompts, DOSES)]
    monkeypatch.setattr("tl_flash.clamps.alone._ANSWERS_AT_ONCE", 1)
    for answer, logits in zip(answers_alone(model, prompts, DOSES), expected, strict=True):
        torch.testing.assert_close(answer.logits, logits, atol=1e-5, rtol=1e-5)


def test_the_hooks_are_gone_afterwards(model):
    before = model(model.to_tokens("a dog"))
    list(answers_alone(model, Prompts.of(model, PROMPTS), DOSES))
    assert torch.equal(model(model.to_tokens("a dog")), before)


def test_a_pass_of_other_rows_is_refused(model):
    with (
        pytest.raises(ValueError, match="clamp_rows: expected passes of 2 rows"),
        clamp_rows(model, [Neuron(0, 3), Neuron(1, 3)], [1.0, 1.0]),
    ):
        model(model.to_tokens("a dog"))


def test_no_rows_are_refused(model):
    with pytest.raises(ValueError, match="clamp nothing"), clamp_rows(model, [], []):
        pass


def test_wrong_neurons_and_values_are_refused(model):
    prompts = Prompts.of(model, PROMPTS)
    for neuron, value, message in (
        (Neuron(99, 0), 1.0, "layer 99"),
        (Neuron(0, 10**6), 1.0, "expected an index below"),
        (Neuron(0, 3), float("nan"), "expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            list(answers_alone(model, prompts, [(neuron, value)]))
