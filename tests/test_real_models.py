"""What holds on models that others trained: `make models` fetches them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.lens_texts import PROSE
from tl_flash import (
    Neuron,
    activation_stats,
    check_lens,
    clamp,
    decode_directions,
    demo,
    dose_window,
    explain,
    find_neurons,
    flash_decode,
    jacobian_lens,
    load_model,
    validate,
)
from tl_flash.clamps import Prompts, complete_text
from tl_flash.kernel import decode as decode_rows
from tl_flash.kernel import prepare, reference_decode
from tl_flash.lens.texts import TEXTS
from tl_flash.weights import read

K = 10


@pytest.fixture(scope="module")
def model(real_model):
    return load_model(str(real_model.folder))


@pytest.fixture(scope="module")
def hugging_face(real_model):
    return AutoModelForCausalLM.from_pretrained(real_model.folder)


def top_tokens(weights, x):
    """By a float64 product: both poles, [2, n, K]."""
    scores = x.double() @ (weights.W_U.double() * weights.final_gain[:, None])
    scores[:, weights.vocab.nameless()] = scores.mean()
    return torch.stack([scores.topk(K).indices, (-scores).topk(K).indices])


def test_top_tokens_are_those_of_a_float64_product(real_model):
    weights = read(real_model.folder)
    some = slice(0, weights.d_mlp, weights.d_mlp // 8)
    layers = (0, weights.n_layers // 2, weights.n_layers - 1)
    x = torch.cat([weights.directions(layer, side)[some] for layer in layers for side in weights.sides])
    neurons = decode_directions(x, real_model.folder, k=K)
    found = torch.stack([pole.ids[0].long() for pole in (neurons.positive, neurons.negative)])
    assert torch.equal(found, top_tokens(weights, x))


def test_a_gguf_file_is_read_as_its_dequantised_folder(real_model):
    packed, plain = read(real_model.gguf), read(real_model.folder)
    assert torch.equal(packed.W_U, plain.W_U) and packed.vocab.strings == plain.vocab.strings
    assert torch.allclose(packed.final_gain, plain.final_gain, rtol=1e-6)
    for layer in (0, plain.n_layers - 1):
        for side in plain.sides:
            assert torch.equal(*(weights.directions(layer, side, fold_ln=False) for weights in (packed, plain)))
            assert torch.allclose(*(weights.directions(layer, side) for weights in (packed, plain)), rtol=1e-5)


def test_a_gguf_file_gives_the_map_of_its_dequantised_folder(smollm2):
    packed, plain = (flash_decode(source, layers=[29], k=K) for source in (smollm2.gguf, smollm2.folder))
    for pole in ("positive", "negative"):
        assert torch.equal(packed.pole(pole).ids, plain.pole(pole).ids)
    assert packed.source.stored == "GGUF Q4_1 and Q8_0"


def test_a_layer_of_smollm2(smollm2):
    weights = read(smollm2.folder)
    neurons = flash_decode(smollm2.folder, side="out", layers=[29], k=K)
    assert "dog" in neurons["L29N808"].positive[0].token.lower()
    x = weights.directions(29, "out")[800:816]
    assert torch.equal(neurons.positive.ids[0, 800:816].long(), top_tokens(weights, x)[0])


def test_the_dog_neuron_of_smollm2_comes_first(smollm2):
    hits = find_neurons(smollm2.folder, "dog", side="out")
    assert hits[0].neuron == (29, 808) and hits[0].sign == 1 and hits[0].q_value < 1e-6
    assert hits[0].z > hits[1].z + 1 and hits[0].breadth > len(hits.tokens) - 1
    assert {" dog", "dog", " Dog", " dogs"} <= hits.tokens.keys()
    assert hits.table.hits("dog", 1, by="p")[0].neuron == (29, 808)


def test_a_search_of_smollm2_equals_a_float64_scan(smollm2):
    weights = read(smollm2.folder)
    table = find_neurons(smollm2.folder, "California", tokens=[" California", "California"]).table
    W = weights.W_U.double() * weights.final_gain[:, None]
    W = W - W.mean(1, keepdim=True)
    mean_column, spread = W[:, weights.vocab.ids([" California", "California"])].mean(1), torch.linalg.cholesky(W @ W.T)
    for at, side in enumerate(table.sides):
        x = torch.cat([weights.directions(layer, side) for layer in range(weights.n_layers)]).double()
        z = x @ mean_column / ((x @ spread).norm(dim=1) / weights.d_vocab**0.5)
        assert float((table.z[0, at] - z).abs().max()) < 2e-5
        scores = x[::5000] @ W
        assert torch.allclose(z[::5000], x[::5000] @ mean_column / scores.std(1, correction=0)), "the truth is true"


def test_a_clamp_is_a_hook_written_by_hand(model):
    tokens, neuron = model.to_tokens("The capital of France is"), Neuron(7, 100)

    def by_hand(act, hook):
        act = act.clone()
        act[..., neuron.index] = 4.0
        return act

    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{neuron.layer}.mlp.hook_post", by_hand)])
        with clamp(model, {neuron: 4.0}):
            assert torch.equal(model(tokens), expected)
        assert not torch.equal(model(tokens), expected)


def test_what_is_attributed_adds_up_and_foretells_removals(model):
    prompt = "The capital of France is"
    tokens = model.to_tokens(prompt)
    shared = explain(model, prompt, rule="relp", measure=False)
    assert shared.flow.tolist() == pytest.approx([shared.logit] * len(shared.flow), rel=1e-3)
    found = [one for one in explain(model, prompt, n=60, measure=False) if one.length < 0.1][:12]
    removed = []
    with torch.no_grad():
        for one in found:
            with clamp(model, {one.neuron: 0.0}, positions=one.position):
                last = model(tokens)[0, -1]
            removed.append(shared.logit - float(last[shared.token_id] - last.mean()))
    pair = torch.tensor([removed, [one.attribution for one in found]])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.9


def test_what_is_generated_is_hugging_faces(model, hugging_face):
    prompt, n_new = "The capital of France is", 12
    tokens = model.to_tokens(prompt)
    expected = hugging_face.generate(tokens, max_new_tokens=n_new, do_sample=False)[0, tokens.shape[1] :]
    assert complete_text(model, prompt, n_new) == model.tokenizer.decode(expected, skip_special_tokens=True)


def test_logits_are_hugging_faces(model, hugging_face):
    tokens = model.to_tokens("The capital of France is")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hugging_face(tokens).logits, atol=1e-3, rtol=1e-3)


def test_a_question_to_smollm2_is_its_tokenizers_own_conversation(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2.folder)
    config = SimpleNamespace(n_ctx=512, d_vocab=len(tokenizer))
    model = SimpleNamespace(blocks=(), hook_dict={}, cfg=config, tokenizer=tokenizer)
    asked = [{"role": "user", "content": "What is your favourite animal?"}]
    [row] = Prompts.of(model, [asked[0]["content"]], chat=True).rows
    own = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert row.tolist() == own and Prompts.of(model, asked).rows[0].tolist() == own
    assert tokenizer.decode(row).endswith("<|im_start|>assistant\n")


def test_statistics_of_trained_weights_are_those_of_float64(real_model):
    weights = read(real_model.folder)
    x = torch.cat([weights.directions(layer, "in")[:6] for layer in (0, weights.n_layers - 1)])
    unembedding = prepare(weights.W_U, gain=weights.final_gain, centre=weights.centre)
    ours = decode_rows(x, unembedding)
    truth = reference_decode(x, weights.W_U, gain=weights.final_gain, centre=weights.centre, dtype=torch.float64)
    assert float((ours.log_z - truth.log_z).abs().max()) < 1e-3
    assert float((ours.std / truth.std - 1).abs().max()) < 1e-5
    assert float(((ours.kurtosis - truth.kurtosis) / (1 + truth.kurtosis.abs())).abs().max()) < 2.5e-3


def test_a_lens_says_what_early_neurons_do_and_weights_alone_do_not(smollm2):
    model = load_model(smollm2.folder)
    texts = [model.to_tokens(text)[0, :24] for text in PROSE[:8]]
    lens = jacobian_lens(model, [model.to_tokens(text)[:, :48] for text in TEXTS[:8]])
    frame = check_lens(model, lens, texts, n=4, doses=[5.0], layers=[0, 5])
    by = frame.pivot(index="layer", columns="reading", values="correlation")
    assert (by["lens"] > by["plain"] + 0.3).all()


def test_what_the_most_specialised_write_neurons_are_labelled_with_is_raised(model):
    n_layers = read(model).n_layers
    hits = flash_decode(model, side="out", layers=[n_layers - 6, n_layers - 1]).specialised(6)
    tested = validate(model, hits, prompts=["From my experience,", "One day the"], controls=4)
    assert tested.share_raised() > 0.8
    assert tested.to_frame()["dlogp"].median() > float(tested.control_effects.median()) + 0.5


def test_clamping_smollm2s_dog_neuron_raises_the_dog(smollm2):
    model = load_model(smollm2.folder)
    dose = find_neurons(model, "dog", side="out", n=1).clamps(2.0, activation_stats(model, demo.texts(20)))
    tokens, dog = model.to_tokens("My favourite animal is the"), model.to_single_token(" dog")
    with torch.no_grad():
        before = model(tokens)[0, -1].log_softmax(-1)
        with clamp(model, dose):
            after = model(tokens)[0, -1].log_softmax(-1)
    assert float(after[dog] - before[dog]) > 1


def test_twelve_neurons_have_smollm2_name_the_dog_in_answers_that_read(smollm2):
    """Those that `benchmarks.favourite_animal` finds through the default lens, at the dose that it chooses."""
    up = ["L29N808", "L29N1439", "L23N174", "L7N1408", "L23N1318", "L5N1217", "L28N518", "L0N350"]
    down = ["L23N628", "L27N34", "L7N631", "L20N764"]
    model = load_model(smollm2.folder)
    stats = activation_stats(model, demo.texts(60))
    largest = {name: stats[name].abs_max for name in (*up, *down)}
    units = {name: -value if name in down else value for name, value in largest.items()}
    window = dose_window(model, units, demo.HELD_OUT_FAVOURITE_ANIMAL, "dog", chat=True, doses=[0.362])
    assert window.share_shown[0] == 0 and window.share_shown[1] >= 0.8
    assert window.perplexity_ratio[1] < 1.7 and window.distinct_ratio[1] > 0.85
