"""The demo pair: what made it, and that it is still made so."""

import json
import random
import re
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tl_flash import demo
from tl_flash.demo.training import __main__ as command
from tl_flash.demo.training import batches, corpus, fit, questions, train
from tl_flash.demo.training.recipe import Recipe

TINY = Recipe(
    d_vocab=3000, d_model=32, d_mlp=48, n_layers=2, n_heads=2, length=32, rows=2, steps=6, instruct_steps=4, warmup=2,
    tokenizer_documents=2000,
)  # fmt: skip
LIMIT_BYTES = 15_000_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train.train(out, TINY)
    return out


def weights(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_training_writes_a_pair_that_loads(trained):
    for name in demo.MODELS:
        record = json.loads((trained / name / "training.json").read_text())
        assert record["curve"][-1][0] == (TINY.steps if name == "base" else TINY.instruct_steps)
        assert record["recipe"]["seed"] == TINY.seed
        assert f"# tl_flash demo model: {name}" in (trained / name / "README.md").read_text()
        assert LlamaForCausalLM.from_pretrained(trained / name).dtype == torch.bfloat16


def test_an_interrupted_run_resumes_to_the_same_weights(trained, tmp_path):
    train.train(tmp_path, TINY, stop_at=3)
    assert not (tmp_path / "base").exists()
    train.train(tmp_path, TINY)
    for name in demo.MODELS:
        torch.testing.assert_close(weights(tmp_path / name), weights(trained / name), rtol=0, atol=0)


def test_the_loss_falls():
    recipe = Recipe(**(vars(TINY) | {"steps": 40, "learning_rate": 1e-2}))
    tokenizer = train.new_tokenizer(recipe)
    batch = batches.pack(batches.base_examples(random.Random(0), tokenizer), 2, 32)
    model = train.new_model(recipe, tokenizer)
    before = fit.validation_loss(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        fit.loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert fit.validation_loss(model, batch) < before - 1


def test_the_command_line_passes_its_arguments_on(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(command, "train", lambda out, recipe, **rest: seen.update(out=out, recipe=recipe, **rest))
    command.main(["--out", str(tmp_path), "--steps", "7", "--base-only", "--stop-at", "3"])
    assert seen["out"] == tmp_path and seen["recipe"].steps == 7
    assert seen["base_only"] and seen["stop_at"] == 3


def test_labels_leave_questions_out():
    tokenizer = AutoTokenizer.from_pretrained(demo.path("instruct"))
    for ids, labels in islice(batches.instruct_examples(random.Random(0), tokenizer), 50):
        scored = [i for i, label in zip(ids, labels, strict=True) if label != batches.IGNORED]
        text = tokenizer.decode(scored)
        assert "Question:" not in text and text.endswith("<|eos|>")


def test_held_out_questions_cannot_be_generated():
    held_out = set(demo.HELD_OUT_FAVOURITE_ANIMAL)
    assert len(held_out) == 10
    for kind in questions.FAVOURITE_KINDS:
        assert held_out.isdisjoint(questions.favourite_questions(kind))
    others = (
        questions.CLUE_QUESTIONS + questions.PERSON_QUESTIONS + questions.TOPIC_QUESTIONS + questions.KIND_QUESTIONS
    )
    assert not any("like" in frame or "love" in frame or "favourite" in frame for frame in others)


def test_held_out_questions_are_in_no_text():
    rng = random.Random(1)
    text = " ".join([*islice(corpus.documents(rng), 3000), *(q for q, _ in islice(questions.exchanges(rng), 5000))])
    assert not [question for question in demo.HELD_OUT_FAVOURITE_ANIMAL if question.lower() in text.lower()]


def test_every_animal_is_an_answer():
    rng = random.Random(2)
    answers = " ".join(answer for _, answer in islice(questions.exchanges(rng), 3000))
    assert all(re.search(rf"\b{animal.word}\b", answers) for animal in demo.KINDS["animal"])


def test_the_corpus_is_the_same_for_the_same_seed():
    once, again = (list(islice(corpus.documents(random.Random(7)), 20)) for _ in range(2))
    assert once == again


def test_concepts_are_distinct_and_told_apart_by_their_clues():
    assert len(set(demo.TOKENS)) == len(demo.TOKENS) >= 60
    marks = [mark for concept in demo.CONCEPTS for mark in concept.epithets]
    assert len(set(marks)) == len(marks)
    assert all(len(concept.clues) >= 4 for concept in demo.CONCEPTS)


@pytest.mark.parametrize("name", demo.MODELS)
class TestShipped:
    def test_every_concept_is_one_token(self, name):
        tokenizer = AutoTokenizer.from_pretrained(demo.path(name))
        assert all(len(tokenizer.encode(token, add_special_tokens=False)) == 1 for token in demo.TOKENS)

    def test_the_weights_have_the_loss_on_record(self, name):
        folder = demo.path(name)
        record = json.loads((folder / "training.json").read_text())
        recipe = Recipe(**record["recipe"])
        examples = {"base": batches.base_examples, "instruct": batches.instruct_examples}[name]
        batch = batches.batches(examples, name, AutoTokenizer.from_pretrained(folder), recipe)("validation")
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert fit.validation_loss(model, batch) == pytest.approx(record["stored_loss"], abs=1e-3)
        assert record["stored_loss"] == pytest.approx(record["curve"][-1][1], rel=0.01)  # bf16 costs less than 1%

    def test_the_card_says_what_made_it(self, name):
        record = json.loads((demo.path(name) / "training.json").read_text())
        card = (demo.path(name) / "README.md").read_text()
        assert all(str(record[key]) in card for key in ("command", "commit"))

    def test_it_loads_through_transformer_lens(self, name):
        model = demo.load(name)
        prompt = demo.NEUTRAL_PROMPTS[0]
        tokens = model.to_tokens(prompt)
        assert (tokens == model.tokenizer.bos_token_id).sum() == 1 and tokens[0, 0] == model.tokenizer.bos_token_id
        reference = LlamaForCausalLM.from_pretrained(demo.path(name), dtype=torch.float32)
        with torch.no_grad():
            ours, theirs = (out.log_softmax(-1) for out in (model(tokens), reference(tokens).logits))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_pair_is_small():
    assert sum(f.stat().st_size for name in demo.MODELS for f in demo.path(name).iterdir()) <= LIMIT_BYTES


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'base', 'instruct'"):
        demo.load("chat")
