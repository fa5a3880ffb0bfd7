"""Every class of models that transformers builds is read right, or refused by name: against measured effects.

What a neuron writes is measured by turning it so far up that nothing else counts, and looking at what its layer
answers; what the unembedding reads, by putting a long vector in the place of what the last layer answers; what a neuron
reads, by the gradient of its pre-activation.
"""

from contextlib import contextmanager

import pytest
import torch
import transformers
from torch.nn.utils import parametrize, prune

from tests import classes
from tl_flash import flash_decode, weights
from tl_flash.weights.calls import doubled
from tl_flash.weights.tiny import token_ids

FAR = 1e7
SMALL = 1e-4
FEW = 12
"""Neurons tried of each MLP until one is seen to write."""


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def over(names):
    return pytest.mark.parametrize("name", names)


def built(name):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return classes.model(name)


READ = [name for name in classes.NAMES if name not in classes.REFUSED]


# Measured


def run(model, **hooks):
    """The logits, with forward hooks on modules by path."""
    handles = [model.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    beside = {"decoder_input_ids": token_ids()} if model.config.is_encoder_decoder else {}
    try:
        with torch.no_grad(), doubled():
            return model(input_ids=token_ids(), use_cache=False, **beside).logits
    finally:
        for handle in handles:
            handle.remove()


def first(answer):
    return answer if torch.is_tensor(answer) else answer[0]


def answered(model, path):
    """What a module answers, [position, d_model]."""
    seen = []
    run(model, **{path: lambda module, args, output: seen.append(first(output).clone())})
    return seen[-1].flatten(0, -2)


@contextmanager
def scaled(vector, factor):
    """One vector of the weights, in place, until the end of the block."""
    before = vector.clone()
    vector.mul_(factor)
    yield
    vector.copy_(before)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def vectors(model, layout, layer, side):
    """Each MLP's, or expert's, vectors as they lie in the model, expert after expert."""
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)}
    found = []
    for neurons in layout.layers[layer].neurons:
        place = {"in": neurons.up, "gate": neurons.gate, "out": neurons.down}[side]
        name = layout.prefix(layer) + place.tensor
        for one in [name] if "{}" not in name else [name.format(expert) for expert in range(100)]:
            rows = place.rows(tensors[one]) if one in tensors else ()
            found += [*rows] if torch.is_tensor(rows) and rows.ndim == 3 else [rows][: len(rows)]
    return found


def written(model, path, vector_in, vector_out):
    """What a neuron adds to the stream at every position: turned far up, it writes, and then writes the reverse."""
    with scaled(vector_in, FAR):
        there = answered(model, path)
        with scaled(vector_out, -1):
            back = answered(model, path)
    return there - back


def tried(model, layout, layer, directions, centre):
    """The neurons of each MLP that were seen to write, and where their vectors are among the layer's directions."""
    path, start, seen = layout.prefix(layer).removesuffix("."), 0, []
    for ins, outs in zip(*(vectors(model, layout, layer, side) for side in ("in", "out")), strict=True):
        for neuron in range(FEW):
            effect = written(model, path, ins[neuron], outs[neuron])
            effect = effect[effect.norm(dim=-1).argmax()]
            if effect.norm() > 1:  # its expert was chosen and its gate open
                effect = effect - effect.mean() if centre else effect
                seen.append((effect, directions[start + neuron]))
                break
        start += len(ins)
    assert start == len(directions), "every neuron is in the layout"
    return seen


@over(READ)
def test_what_neurons_write_is_what_they_are_seen_to_write(name):
    model = built(name)
    layout, read = weights.layout(model), weights.read(model)
    for layer in {layout.readable[0], layout.readable[-1]}:
        seen = tried(model, layout, layer, read.directions(layer, "out"), read.centre)
        assert seen
        for effect, direction in seen:
            assert abs(cosine(effect, direction)) > 1 - 1e-6, layer


@over(READ)
def test_what_the_unembedding_reads_is_what_moves_the_logits(name):
    model = built(name)
    layout, read = weights.layout(model), weights.read(model)
    v = torch.randn(read.d_model, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * FAR
    last = layout.prefix(len(layout.layers) - 1).removesuffix(".")

    def instead(sign):
        def hook(module, args, output):
            there = torch.zeros_like(first(output)) + sign * v
            return there if torch.is_tensor(output) else (there, *output[1:])

        return run(model, **{last: hook})[0, -1]

    head = model.get_parameter(layout.unembedding.tensor).detach()
    with scaled(head, SMALL):  # where no softcap is seen
        seen = (instead(1) - instead(-1)).double() / 2 / SMALL
    x = v - v.mean() if read.centre else v
    x = x / x.square().mean().sqrt() if read.final_norm else x
    x = x if read.final_gain is None else x * read.final_gain
    truth = x @ read.W_U.double()
    torch.testing.assert_close(seen, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def reads(model, layout, layer):
    """What the norm before a layer's neurons is given, and what they are; where none is, both are the latter."""
    this = layout.layers[layer]
    up = this.neurons[-1].up
    path = (layout.prefix(layer) + up.tensor).rpartition(".")[0]
    seen = {}

    def keep(key):
        return lambda module, args, kwargs, output: seen.update({key: ([*args, *kwargs.values()][0], output)})

    handles = [model.get_submodule(path).register_forward_hook(keep("up"), with_kwargs=True)]
    if this.pre is not None and this.pre.weight is not None:
        norm = model.get_submodule((layout.prefix(layer) + this.pre.weight).rpartition(".")[0])
        handles.append(norm.register_forward_hook(keep("norm"), with_kwargs=True))
    beside = {"decoder_input_ids": token_ids()} if model.config.is_encoder_decoder else {}
    with doubled():
        model(input_ids=token_ids(), use_cache=False, **beside)
    for handle in handles:
        handle.remove()
    return seen


DENSE_LAST = [name for name in READ if name not in classes.ROUTED_ALONE]


@over(DENSE_LAST)
def test_what_neurons_read_is_the_gradient_of_their_pre_activation(name):
    model = built(name)
    layout, read = weights.layout(model), weights.read(model)
    layer = layout.readable[-1]
    neurons = layout.layers[layer].neurons[-1]
    assert not neurons.routed
    seen = reads(model, layout, layer)
    start = len(read.directions(layer, "in")) - neurons.up.d_mlp(
        dict(model.named_parameters(remove_duplicate=False))[layout.prefix(layer) + neurons.up.tensor].shape
    )
    pre, y = layout.layers[layer].pre, seen["up"][1]
    plain = pre is None or pre.weight is None
    stream = seen["up" if plain else "norm"][0]
    for side in read.sides[:-1]:
        place = {"in": neurons.up, "gate": neurons.gate}[side]
        if place.tensor != neurons.up.tensor:
            continue
        width = y.shape[-1] // place.parts
        column = 3 * place.parts + place.part if place.interleaved else 3 + place.part * width
        (gradient,) = torch.autograd.grad(y.reshape(-1, y.shape[-1])[-1, column], stream, retain_graph=True)
        gradient = gradient.reshape(-1, read.d_model)[-1]
        x = read.directions(layer, side)[start + 3].double()
        if plain:
            gradient = gradient - gradient.mean() if read.centre else gradient
        else:
            s = stream.detach().reshape(-1, read.d_model)[-1].double()
            s = s - s.mean() if read.centre else s
            u = s / s.square().mean().sqrt()
            x = x - u * (u @ x) / read.d_model
        assert cosine(gradient, x) > 1 - 1e-6


@over([name for name in READ if name not in classes.UNSAVED])
def test_a_folder_gives_what_its_model_gives(name, tmp_path):
    double = built(name)
    model = type(double)(double.config).float().eval()
    model.load_state_dict(double.state_dict())
    model.save_pretrained(tmp_path)
    of_model, of_folder = weights.read(model), weights.read(tmp_path)
    assert weights.layout(model).readable == weights.layout(tmp_path).readable
    assert torch.equal(of_model.W_U, of_folder.W_U) and of_model.sides == of_folder.sides
    if of_model.final_gain is not None:
        torch.testing.assert_close(of_folder.final_gain, of_model.final_gain, rtol=1e-6, atol=0)
    readable = weights.layout(model).readable
    of_folder.require_layers(readable)
    for layer in readable:
        for side in of_model.sides:
            assert torch.equal(of_model.directions(layer, side), of_folder.directions(layer, side))


@pytest.mark.parametrize("name, message", classes.REFUSED.items())
def test_what_has_no_reading_is_refused_by_name(name, message):
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        weights.read(built(name))


@pytest.mark.parametrize("name", ["DeepseekV4ForCausalLM", "HYV4ForCausalLM", "Glm5NextForConditionalGeneration"])
def test_streams_that_run_side_by_side_are_told(name):
    layout = weights.layout(built(name))
    assert layout.n_streams == 4 and "of a sum of 4 streams" in str(layout)


def test_layers_that_text_alone_does_not_run_are_told():
    layout = weights.layout(built("MllamaForCausalLM"))
    assert layout.readable == [0, 2, 3] and layout.layers[1].fault == "it does not run on text alone"


def test_a_softcap_does_not_scale():
    config = transformers.Gemma2Config(**classes.TINY, head_dim=8, final_logit_softcapping=2.0)
    assert weights.layout(transformers.Gemma2ForCausalLM(config)).scale == 1


def test_a_scale_that_goes_with_the_width_is_that_of_the_model():
    config = transformers.T5Config(
        d_model=96, d_kv=8, d_ff=40, num_layers=2, num_heads=4, vocab_size=97, tie_word_embeddings=True
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    gain = model.decoder.final_layer_norm.weight.detach() / 96**0.5
    torch.testing.assert_close(weights.read(model).final_gain, gain)


def changed(how):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**classes.TINY)).eval()
    linear = model.model.layers[1].mlp.up_proj
    if how == "mask":
        prune.random_unstructured(linear, "weight", 0.5)
    elif how == "parametrisation":
        parametrize.register_parametrization(linear, "weight", torch.nn.Softplus())
    else:
        model.model.layers[1].mlp.up_proj = torch.nn.Sequential(linear)
    return model


def test_a_module_that_was_replaced_is_refused():
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.*holds no weight.*was the module replaced"):
        weights.read(changed("wrapper")).layer(1)


def test_a_mask_made_permanent_is_read():
    model = changed("mask")
    prune.remove(model.model.layers[1].mlp.up_proj, "weight")
    assert bool((weights.read(model).directions(1, "in", fold_ln=False) == 0).any())


def test_shared_experts_are_numbered_on_after_the_routed_ones():
    model = built("DeepseekV3ForCausalLM")
    layer = weights.layout(model).readable[-1]
    read, mlp = weights.read(model).layer(layer), model.model.layers[layer].mlp
    routed, width = mlp.experts.down_proj.shape[0], mlp.experts.down_proj.shape[2]
    shared = mlp.shared_experts.up_proj.weight
    assert read.n_experts == routed + len(shared) // width and read.widths == [width] * read.n_experts
    assert torch.equal(torch.cat(read.W_in[routed:]), shared)


def test_a_shared_expert_of_an_odd_width_is_read_and_in_no_map():
    config = transformers.Qwen2MoeConfig(
        **classes.TINY, moe_intermediate_size=24, shared_expert_intermediate_size=36, num_experts=4
    )
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    assert len(weights.read(model).directions(0, "out")) == 4 * 24 + 36
    with pytest.raises(ValueError, match="its shared expert has 36 neurons, no multiple of the 24 of a routed one"):
        flash_decode(model)
