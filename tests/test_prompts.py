from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from tests import families
from tl_flash import Neuron, activation_stats, clamp_sweep, flash_decode, jacobian_lens, mention_rate, validate
from tl_flash.clamps import NEUTRAL_PROMPTS, Answers, Prompts, complete_text
from tl_flash.evidence.effects import effects
from tl_flash.weights import measuring


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
        Prompts.of(bridge, [3])  # one prompt of one token, or several of one? [[3]] says which
    with pytest.raises(TypeError, match=r"\[prompt, position\]"):
        Prompts.of(bridge, torch.zeros(3))
    with pytest.raises(ValueError, match="at least one"):
        Prompts.of(bridge, [])
    with pytest.raises(ValueError, match="n_ctx"):
        Prompts.of(bridge, torch.zeros(1, bridge.cfg.n_ctx + 1, dtype=torch.long))
    for wrong in (-1, bridge.cfg.d_vocab):
        with pytest.raises(ValueError, match=f"expected token ids of 0 to {bridge.cfg.d_vocab - 1}, got {wrong}"):
            Prompts.of(bridge, [torch.tensor([1, wrong])])
    with pytest.raises(ValueError, match="batch_size"):
        Answers.of(bridge, Prompts.of(bridge, ["a dog"]), batch_size=0)


def test_there_are_twenty_neutral_prompts():
    assert len(set(NEUTRAL_PROMPTS)) == 20


TEXTS = ["a dog", "the cat ran to the red house", "near the sea"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [dict, "BatchEncoding", "numpy", "lists"])
def test_a_tokenizers_answer_is_taken_without_its_padding(bridge, tokenizer, side, kind):
    ragged = [tokenizer.encode(text) for text in TEXTS]
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)
    if kind is dict:
        batch = dict(batch)
    elif kind == "numpy":
        batch = {name: part.numpy() for name, part in batch.items()}
    elif kind == "lists":
        batch = dict(tokenizer(TEXTS))
    assert [row.tolist() for row in Prompts.of(bridge, batch).rows] == ragged


@pytest.mark.parametrize(
    "prompts",
    [
        pd.Series(TEXTS),
        (text for text in TEXTS),
        tuple(TEXTS),
        np.array(TEXTS, dtype=object),
        dict.fromkeys(TEXTS).keys(),
    ],
    ids=["Series", "generator", "tuple", "array", "keys"],
)
def test_any_iterable_of_texts_is_taken(bridge, prompts):
    assert Prompts.of(bridge, prompts).texts == tuple(TEXTS)


def test_lists_and_arrays_of_ids_are_taken(bridge):
    for ids in ([[3, 4], [5]], [np.array([3, 4]), np.array([5])], [torch.tensor([[3, 4]]), torch.tensor([5])]):
        assert [row.tolist() for row in Prompts.of(bridge, ids).rows] == [[3, 4], [5]]
    assert [row.tolist() for row in Prompts.of(bridge, np.array([[3, 4]], dtype=np.int32)).rows] == [[3, 4]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (pd.DataFrame({"id": [1], "text": ["a dog"]}), r"DataFrame of columns \['id', 'text'\]"),
        ({"text": ["a dog"]}, r"a dict with input_ids, got one of \['text'\]"),
        (b"a dog", "got bytes"),
        ([b"a dog"], "got bytes"),
        ([{"text": "a dog"}], "got dict"),
        (3, "got int"),
        ([None], "got NoneType"),
        ([["a dog"]], "got list"),
    ],
    ids=str,
)
def test_what_is_no_list_of_texts_is_refused_by_name(bridge, prompts, message):
    with pytest.raises(TypeError, match=message):
        Prompts.of(bridge, prompts)


@pytest.mark.parametrize("mask", [[[1, 0, 1]], [[1, 2, 1]], [[1, 1]]])
def test_masks_that_are_no_padding_are_refused(bridge, mask):
    with pytest.raises(ValueError, match="attention_mask"):
        Prompts.of(bridge, {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.tensor(mask)})


def test_a_text_that_is_longer_than_the_model_reads_is_refused_not_cut(bridge):
    with pytest.raises(ValueError, match="n_ctx"):
        Prompts.of(bridge, [" dog" * (bridge.cfg.n_ctx + 1)])


@pytest.mark.parametrize("surface", families.surfaces()[1:])
def test_a_text_that_begins_with_bos_has_one(surface):
    model = families.build("llama", surface)
    plain, with_bos = Prompts.of(model, ["a dog", "<s>a dog"]).rows
    assert plain.tolist() == with_bos.tolist() and plain[0] == 0 != plain[1]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }} {{ m.content }}{% if not (loop.last and m.role[0] == 'a') %}"
    "</s>{% endif %}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture
def chatty(bridge, monkeypatch):
    monkeypatch.setattr(bridge.tokenizer, "chat_template", TEMPLATE)
    return bridge


def test_a_conversation_goes_through_the_template_and_has_one_bos(chatty):
    user = {"role": "user", "content": "the dog"}
    encode = partial(chatty.tokenizer.encode, add_special_tokens=False)
    asked = encode("<s>u the dog</s>a ")
    assert asked.count(0) == 1
    for prompts, chat in (([user], False), ([[user], [user]], False), (["the dog"], True), ([[user]], True)):
        assert {tuple(row.tolist()) for row in Prompts.of(chatty, prompts, chat=chat).rows} == {tuple(asked)}
    answered = Prompts.of(chatty, [user, {"role": "assistant", "content": "the cat"}]).rows[0]
    assert answered.tolist() == encode("<s>u the dog</s>a the cat")


def test_chat_is_refused_where_it_means_nothing(chatty, hooked):
    with pytest.raises(ValueError, match="chat: expected texts or messages"):
        Prompts.of(chatty, torch.tensor([[3]]), chat=True)
    with pytest.raises(ValueError, match="no chat template"):
        Prompts.of(hooked, ["a dog"], chat=True)


def test_chat_is_there_wherever_prompts_are_taken(chatty):
    stats = [activation_stats(chatty, *given) for given in ([["a dog"]], [[[{"role": "user", "content": "a dog"}]]])]
    chat = activation_stats(chatty, ["a dog"], chat=True)
    assert chat.count == stats[1].count > stats[0].count and torch.equal(chat.mean, stats[1].mean)
    message = [{"role": "user", "content": "a dog"}]
    sweeps = [
        clamp_sweep(chatty, "L1N3", [1.0], prompts, [5], chat=chat)
        for prompts, chat in ((["a dog"], True), (message, False))
    ]
    assert torch.equal(sweeps[0].logit, sweeps[1].logit)
    said = [
        mention_rate(chatty, prompts, "dog", {"L1N3": 1.0}, chat=chat, max_new_tokens=3).completions_before
        for prompts, chat in ((["a dog"], True), (message, False))
    ]
    assert said[0] == said[1] == (complete_text(chatty, "a dog", 3, chat=True),)
    hits = flash_decode(chatty, side="out").specialised(2, quantile=0.5)
    tested = [
        validate(chatty, hits, prompts=prompts, chat=chat, controls=3, value=2.0).records[0]["dlogp"]
        for prompts, chat in (
            (["a dog", "the cat"], True),
            ([message, [{"role": "user", "content": "the cat"}]], False),
        )
    ]
    assert tested[0] == tested[1]


# Training mode


@pytest.fixture
def training():
    """A bridge of a GPT-2 with dropout, in training mode but for one module."""
    model = families.copied(families.build("gpt2", "bridge")).train()
    model.blocks[1].ln2.eval()
    return model


def modes(model):
    return [module.training for module in (*model.modules(), *model.original_model.modules())]


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: Answers.of(model, Prompts.of(model, ["a dog"])).logits,
        lambda model: activation_stats(model, ["a dog"]).max,
        lambda model: clamp_sweep(model, "L1N3", [1.0], ["a dog"], [5]).prob,
        lambda model: mention_rate(model, ["a dog"], "dog", {"L1N3": 1.0}, max_new_tokens=4).completions_after,
        lambda model: jacobian_lens(model, ["a dog ran to the sea"]).J,
        lambda model: jacobian_lens(model, ["a dog ran to the sea"], method="exact").J,
        lambda model: next(effects(model, Prompts.of(model, ["a dog ran"]), [(Neuron(1, 3), 1.0)])),
    ],
    ids=["answers", "activation_stats", "clamp_sweep", "mention_rate", "mean_field", "exact", "effects"],
)
def test_dropout_is_no_part_of_a_measurement(training, measure):
    truth = measure(families.copied(families.build("gpt2", "bridge")).eval())
    with torch.no_grad():
        logits = [training(torch.tensor([[3, 4, 5]])) for _ in range(2)]
    assert not torch.equal(*logits), "else the model has no dropout"
    before, measured = modes(training), measure(training)
    assert measured == truth if isinstance(truth, tuple) else torch.equal(measured, truth)
    assert modes(training) == before and len(set(before)) == 2


def test_the_mode_comes_back_after_an_exception(training):
    before = modes(training)
    with pytest.raises(ZeroDivisionError), measuring(training):
        assert not any(modes(training))
        1 / 0  # noqa: B018
    assert modes(training) == before
