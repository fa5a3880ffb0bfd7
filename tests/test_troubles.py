"""Models as people have them: adapted, pruned, sharded, without a norm, with a head of their own."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tests import families
from tl_flash import (
    activation_stats,
    clamp_sweep,
    flash_decode,
    validate,
)
from tl_flash.kernel import reference_decode
from tl_flash.weights import read

SURFACES = ["hf", "bridge"]
LINEARS = {"in": "up_proj", "gate": "gate_proj", "out": "down_proj"}


def fresh(surface, name="llama", change=lambda hf: None):
    """A model of one's own on a surface, changed before a bridge is made of it."""
    hf = copy.deepcopy(families.hf_model(name))
    change(hf)
    return hf if surface == "hf" else booted(hf)


def booted(hf):
    from transformer_lens.model_bridge import TransformerBridge

    hf.config.architectures = [type(hf).__name__]
    return TransformerBridge.boot_transformers("tiny/own", hf_model=hf, tokenizer=families.tokenizer(), device="cpu")


# Adapters, masks, parametrisations


class LoraLinear(nn.Module):
    """What PEFT puts in place of a linear map: its `weight` is the base's, its answer is not."""

    def __init__(self, base, scale=1.0):
        super().__init__()
        self.base_layer, self.scale = base, scale
        generator = torch.Generator().manual_seed(0)
        n_in, n_out = base.in_features, base.out_features
        self.in_features, self.out_features = n_in, n_out
        self.lora_A = nn.Parameter(torch.randn(2, n_in, generator=generator))
        self.lora_B = nn.Parameter(torch.randn(n_out, 2, generator=generator) * scale)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T

    def merged(self):
        with torch.no_grad():
            self.base_layer.weight += self.lora_B @ self.lora_A
        return self.base_layer


class Quantised(nn.Module):
    """What GPTQ puts in place of a linear map."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("qweight", torch.zeros(base.in_features // 8, base.out_features, dtype=torch.int32))

    def forward(self, x):
        return x @ torch.zeros(self.in_features, self.out_features)


def put(hf, side, make):
    """Replace the linear map of a side in layer 1, or the lm_head."""
    owner, name = (hf, "lm_head") if side == "lm_head" else (hf.model.layers[1].mlp, LINEARS[side])
    setattr(owner, name, make(getattr(owner, name)))
    return hf


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("side", [*LINEARS, "lm_head"])
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["large", "small"])
def test_an_adapter_that_is_not_merged_is_refused(surface, side, scale):
    model = fresh(surface, change=lambda hf: put(hf, side, lambda base: LoraLinear(base, scale)))
    with pytest.raises(ValueError, match=r"merge it first, with PEFT's model.merge_and_unload\(\)"):
        for of_neurons in ("in", "gate", "out"):
            flash_decode(model, side=of_neurons)


@pytest.mark.parametrize("surface", SURFACES)
def test_a_merged_adapter_is_read(surface):
    merged = fresh(surface, change=lambda hf: put(hf, "in", lambda base: LoraLinear(base).merged()))
    layer = 1
    assert torch.equal(
        flash_decode(merged).positive.ids[0], flash_decode(families.build("llama", surface)).positive.ids[0]
    )
    truth = families.literal("llama", layer, "in").float()
    adapter = LoraLinear(copy.deepcopy(families.hf_model("llama").model.layers[1].mlp.up_proj))
    assert torch.allclose(
        read(merged).directions(layer, "in", fold_ln=False), truth + adapter.lora_B @ adapter.lora_A, atol=1e-5
    )


@pytest.mark.parametrize("surface", SURFACES)
def test_an_adapter_on_attention_alone_is_none_of_the_neurons_business(surface):
    def adapt(hf):
        hf.model.layers[1].self_attn.q_proj = LoraLinear(hf.model.layers[1].self_attn.q_proj)

    model = fresh(surface, change=adapt)
    assert torch.equal(flash_decode(model).positive.ids, flash_decode(families.build("llama", surface)).positive.ids)


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("kind", ["pruned", "weight norm", "parametrised"])
def test_masked_and_parametrised_weights_are_read_as_they_act(surface, kind):
    from torch.nn.utils import parametrizations, parametrize, prune

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    def change(hf):
        torch.manual_seed(0)
        for mlp in (layer.mlp for layer in hf.model.layers):
            for name in LINEARS.values():
                linear = getattr(mlp, name)
                if kind == "pruned":
                    prune.random_unstructured(linear, "weight", amount=0.5)
                elif kind == "weight norm":
                    parametrizations.weight_norm(linear)
                    linear.parametrizations.weight.original0.data.mul_(3)
                else:
                    parametrize.register_parametrization(linear, "weight", Twice())

    hf = fresh("hf", change=change)
    weights = read(fresh(surface, change=change))
    for side, name in LINEARS.items():
        linear = getattr(hf.model.layers[1].mlp, name)
        acts = linear(torch.eye(linear.in_features)).detach()  # [input, output]
        acts = acts if side == "out" else acts.T
        plain = families.literal("llama", 1, side).float()
        found = weights.directions(1, side, fold_ln=False)
        assert torch.allclose(found, acts, atol=1e-5) and not torch.allclose(found, plain, atol=1e-2)


@pytest.mark.parametrize("side", [*LINEARS, "lm_head"])
def test_quantised_modules_are_refused_by_name(side):
    with pytest.raises(ValueError, match=r"Quantised that holds no weight"):
        flash_decode(put(fresh("hf"), side, Quantised))


def test_whole_numbers_are_refused_as_quantised():
    def quantise(linear):
        linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
        return linear

    with pytest.raises(ValueError, match="load the unquantised model"):
        flash_decode(put(fresh("hf"), "in", quantise))


# Weights that are elsewhere


@pytest.mark.parametrize("surface", SURFACES)
def test_weights_on_the_meta_device_are_refused_and_the_advice_works(surface, tmp_path):
    model = fresh(surface)
    whole = flash_decode(model)
    hf = fresh("hf")
    hf.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="give its checkpoint folder instead"):
        flash_decode(model.to("meta") if surface == "hf" else booted(hf.to("meta")))
    advised = flash_decode(tmp_path / "folder", tokenizer=None if surface == "hf" else families.tokenizer())
    assert torch.equal(advised.positive.ids, whole.positive.ids)


def test_sharded_weights_are_refused_and_the_advice_works(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = fresh("hf")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sharded = fully_shard(fresh("hf"), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"gather each parameter with .full_tensor\(\)"):
            flash_decode(sharded)
        gathered = fresh("hf", change=lambda hf: [p.data.zero_() for p in hf.parameters()])
        gathered.load_state_dict({name: p.full_tensor() for name, p in sharded.state_dict().items()})
    finally:
        distributed.destroy_process_group()
    assert torch.equal(flash_decode(gathered).positive.ids, flash_decode(whole).positive.ids)


@pytest.mark.parametrize("surface", SURFACES)
def test_a_compiled_model_is_the_model(surface):
    model = families.build("llama", surface)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, where it first compiles
        compiled = torch.compile(model)
    assert torch.equal(flash_decode(compiled).positive.ids, flash_decode(model).positive.ids)


# float64 and other defaults


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("side", ["in", "out"])
def test_a_float64_model_is_read(surface, side):
    model = families.double("llama") if surface == "hf" else booted(copy.deepcopy(families.double("llama")))
    neurons = flash_decode(model, side=side, k=4)
    for layer in range(families.N_LAYERS):
        truth = reference_decode(
            families.direction("llama", layer, side),
            families.unembedding("llama"),
            k=4,
            ignore=neurons.vocab.nameless(),
            dtype=torch.float64,
        )
        assert torch.equal(neurons.positive.ids[layer], truth.ids[0])
        assert torch.allclose(neurons.positive.logits[layer], truth.logits[0], rtol=1e-5)


def results(model):
    neurons = flash_decode(model, side="out", k=3, tokens=[5])
    hits = neurons.specialised(2, quantile=0.5)
    return {
        "ids": neurons.positive.ids,
        "logits": neurons.positive.logits,
        "log_z": neurons.positive.log_z,
        "write_z": neurons.positive.write_z,
        "std": neurons.std,
        "null": neurons.null.z,
        "stats": activation_stats(model, ["a dog and a cat"]).quantiles,
        "sweep": clamp_sweep(model, "L1N3", [1.0, 2.0], ["a dog"], [5]).prob,
        "effects": validate(model, hits, controls=3, prompts=["a dog", "the cat"]).control_effects,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_nothing_hangs_on_the_default_dtype(bridge, dtype):
    expected = results(bridge)
    torch.set_default_dtype(dtype)
    try:
        found = results(bridge)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name


def test_everything_runs_under_inference_mode(bridge):
    expected = results(bridge)
    with torch.inference_mode():
        found = results(bridge)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("surface", [s for s in families.surfaces() if s not in ("hf", "bridge-compat")])
def test_float64_models_are_measured(surface):
    """A bridge in compatibility mode does not run once it is moved to float64."""
    model = copy.deepcopy(families.build("llama", surface)).to(torch.float64)
    hits = flash_decode(model, side="out").specialised(2, quantile=0.5)
    assert validate(model, hits, controls=3, prompts=["a dog", "the cat"]).to_frame()["dlogp"].notna().all()
    assert float(activation_stats(model, ["a dog"]).max.max()) > 0
