"""Models as people have them: adapted, pruned, sharded, without a norm, with a head of their own."""

import copy
import warnings
from functools import reduce

import pytest
import torch
import transformers
from torch import nn

from tests import families
from tl_flash import (
    NeuronMap,
    activation_stats,
    clamp,
    clamp_sweep,
    decode_directions,
    flash_decode,
    jacobian_lens,
    load_model,
    mention_rate,
    validate,
)
from tl_flash.kernel import reference_decode
from tl_flash.weights import read
from tl_flash.weights.norms import traced_final_norm

SURFACES = ["hf", "bridge"]
LINEARS = {"in": "up_proj", "gate": "gate_proj", "out": "down_proj"}


def fresh(surface, name="llama", change=lambda hf: None):
    """A model of one's own on a surface, changed before a bridge is made of it."""
    hf = copy.deepcopy(families.hf_model(name))
    change(hf)
    return hf if surface == "hf" else booted(hf)


def booted(hf):
    if not families.HAS_BRIDGE:
        pytest.skip("TransformerLens 2 has no bridges")
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


def test_an_adapter_on_a_map_that_holds_gate_and_up_is_refused():
    def adapt(hf):
        hf.model.layers[1].mlp.gate_up_proj = LoraLinear(hf.model.layers[1].mlp.gate_up_proj)

    for surface in SURFACES:
        with pytest.raises(ValueError, match="merge it first"):
            flash_decode(fresh(surface, "phi3", adapt))


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


def test_a_folder_of_a_base_and_its_adapter_is_refused_and_the_advice_works(tmp_path):
    hf = put(fresh("hf"), "in", lambda base: LoraLinear(base).merged())
    fresh("hf").save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"merge_and_unload\(\), and save the result to a folder of its own"):
        flash_decode(tmp_path / "both")
    hf.save_pretrained(tmp_path / "merged")
    assert torch.equal(flash_decode(tmp_path / "merged").positive.ids, flash_decode(hf).positive.ids)


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
    model = families.copied(families.build("llama", surface)).to(torch.float64)
    hits = flash_decode(model, side="out").specialised(2, quantile=0.5)
    assert validate(model, hits, controls=3, prompts=["a dog", "the cat"]).to_frame()["dlogp"].notna().all()
    assert float(activation_stats(model, ["a dog"]).max.max()) > 0


# Models of a config of one's own

needs_hooked = pytest.mark.skipif(not families.HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has none")
SIZES = dict(d_model=24, d_head=6, n_heads=4, d_mlp=36, n_layers=2, n_ctx=16, d_vocab=30, seed=0, device="cpu")


def hooked_of(**options):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(HookedTransformerConfig(**(SIZES | dict(act_fn="relu") | options)), move_to_device=False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + noise if name.endswith(".w") else noise
    return model


def folded(model, **options):
    model = copy.deepcopy(model)
    model.load_and_process_state_dict(copy.deepcopy(model.state_dict()), center_unembed=False, **options)
    return model


def alike(a, b):
    assert torch.equal(a.positive.ids, b.positive.ids) and torch.equal(a.negative.ids, b.negative.ids)
    for name in ("logits", "log_z", "write_z"):
        assert torch.allclose(getattr(a.positive, name), getattr(b.positive, name), rtol=1e-3, atol=1e-4), name


@needs_hooked
@pytest.mark.parametrize("side", ["in", "out"])
def test_without_a_norm_a_direction_is_read_at_its_own_length(side, tmp_path):
    model = hooked_of(normalization_type=None)
    neurons = flash_decode(model, side=side, k=3, tokens=[5])
    mlp = model.blocks[1].mlp
    x = (mlp.W_in.T if side == "in" else mlp.W_out).detach()
    scores = x.double() @ model.W_U.double()
    probs = scores.softmax(-1)
    assert torch.allclose(
        neurons.positive.probs[1].double(), probs.gather(1, neurons.positive.ids[1].long()), rtol=1e-3
    )
    away = (-scores).softmax(-1)
    assert torch.allclose(neurons.negative.probs[1].double(), away.gather(1, neurons.negative.ids[1].long()), rtol=1e-3)
    assert torch.allclose(neurons.tracked_probs(5)[1].double(), probs[:, 5], rtol=1e-3)
    assert torch.allclose(neurons.norm[1], x.norm(dim=-1)) and not neurons.source.final_norm
    neurons.save(tmp_path / "map")
    loaded = type(neurons).load(tmp_path / "map")
    assert torch.equal(loaded.positive.probs, neurons.positive.probs)
    assert loaded["L1N3"].positive == neurons["L1N3"].positive
    alone = decode_directions(x, model, k=3)
    assert torch.allclose(alone.positive.probs[0], neurons.positive.probs[1])
    assert torch.allclose(alone.norm[0], x.norm(dim=-1))


@needs_hooked
def test_a_clamp_without_a_norm_moves_the_logits_as_the_write_direction_says():
    model = hooked_of(normalization_type=None)
    tokens = torch.arange(5)[None]
    neurons = flash_decode(model, side="out", k=30)
    with torch.no_grad():
        before = model(tokens)[0, -1]
        with clamp(model, {"L1N3": 1.0}, mode="add"):
            change = model(tokens)[0, -1] - before
    change = change - change.mean()
    assert torch.allclose(neurons.positive.logits[1, 3], change[neurons.positive.ids[1, 3].long()], atol=1e-5)


@needs_hooked
@pytest.mark.parametrize("normalization_type", [None, "LN"])
def test_modular_addition_has_classes_of_its_own(normalization_type):
    model = hooked_of(d_vocab_out=19, normalization_type=normalization_type)
    model.tokenizer = families.tokenizer()
    neurons = flash_decode(model, side="out", k=3)
    assert neurons.d_vocab == 19 and neurons.vocab.string(4) == "<4>"
    assert flash_decode(model, side="out", k=3, tokenizer=[f"class {i}" for i in range(19)]).vocab.id("class 4") == 4
    prompts = torch.tensor([[3, 29, 25], [1, 20, 28]])
    sweep = clamp_sweep(model, "L1N3", [0.0, 2.0], prompts, [4, 18])
    assert sweep.tokens == ("<4>", "<18>") and sweep.prob.shape == (2, 2, 2)
    assert activation_stats(model, prompts).count == 6
    tested = validate(model, neurons.specialised(2, quantile=0.5), prompts=prompts, controls=3, value=3.0)
    assert len(tested.records) == 2 and tested.to_frame()["perplexity_ratio"].isna().all()


@needs_hooked
@pytest.mark.parametrize("side", ["in", "out"])
def test_a_last_norm_that_does_not_centre_is_told_from_the_others(side):
    raw = hooked_of(normalization_type="LN", final_rms=True)
    for model in (raw, folded(raw)):  # TransformerLens folds to another model here, whose own W_U is then the truth
        neurons = flash_decode(model, side=side, k=3)
        block = model.blocks[1]
        x = block.mlp.W_out if side == "out" else (getattr(block.ln2, "w", torch.ones(24))[:, None] * block.mlp.W_in).T
        x = x - x.mean(-1, keepdim=True) if side == "in" else x
        W_U = getattr(model.ln_final, "w", torch.ones(24))[:, None] * model.W_U
        truth = reference_decode(x.detach(), W_U.detach(), k=3, dtype=torch.float64)
        assert torch.equal(neurons.positive.ids[1], truth.ids[0])
        assert torch.allclose(neurons.positive.log_z[1], truth.log_z[0], atol=1e-4)


@needs_hooked
def test_a_norm_over_the_neurons_is_folded_as_TransformerLens_folds_it():
    model = hooked_of(normalization_type="LN", act_fn="solu_ln")
    ready = folded(model)
    if families.TRANSFORMER_LENS < 3:
        pytest.skip("TransformerLens 2 does not fold it")
    assert not hasattr(ready.blocks[0].mlp.ln, "w"), "else nothing was folded"
    for side in ("in", "out"):
        alike(flash_decode(model, side=side, k=3), flash_decode(ready, side=side, k=3))
    assert torch.allclose(read(model).directions(1, "out", neurons=slice(3, 9)), read(model).directions(1, "out")[3:9])
    plain = read(model).directions(1, "out", fold_ln=False)
    assert torch.equal(plain, model.blocks[1].mlp.W_out.detach())


# Directions through models whose MLPs cannot be read


def mamba():
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=97, hidden_size=40, num_hidden_layers=2, state_size=4)
    )


def randomised(hf):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return hf.eval()


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("make", [mamba], ids=["mamba"])
def test_directions_need_no_mlp(surface, make):
    hf = randomised(make())
    gain, head = hf.backbone.norm_f.weight.detach(), hf.lm_head.weight.detach()
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    truth = reference_decode(x, gain[:, None] * head.T, k=3, ignore=range(72, 97), dtype=torch.float64)
    model = hf if surface == "hf" else booted(hf)
    found = decode_directions(x, model, k=3, tokenizer=families.tokenizer())
    assert torch.equal(found.positive.ids[0], truth.ids[0])
    assert torch.allclose(found.positive.log_z[0], truth.log_z[0], atol=1e-4)
    with pytest.raises(ValueError, match="MLP|not known"):
        flash_decode(model)


@needs_hooked
def test_directions_need_no_mlp_of_an_attention_only_model():
    model = hooked_of(attn_only=True, normalization_type="LN")
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    W_U = (model.ln_final.w[:, None] * model.W_U).detach()
    truth = reference_decode(x, W_U, centre=True, k=3, dtype=torch.float64)
    found = decode_directions(x, model, k=3)
    assert torch.equal(found.positive.ids[0], truth.ids[0])
    assert torch.allclose(found.positive.log_z[0], truth.log_z[0], atol=1e-4)
    with pytest.raises(ValueError, match="no MLP"):
        flash_decode(model)


@pytest.mark.parametrize("name", families.DENSE)
def test_the_norm_that_is_traced_is_the_final_one(name):
    family, hf = families.FAMILIES[name], families.hf_model(name)
    gain, centre = traced_final_norm(hf, hf.lm_head if hasattr(hf, "lm_head") else hf.embed_out)
    truth = families.gain(families.part(name, family.final_norm), family.layer_norm).float()
    assert centre == family.layer_norm and torch.allclose(gain, truth, rtol=1e-3, atol=1e-4)


# Heads that do not read the residual stream


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_a_masked_language_models_head_is_refused(surface, kind):
    sizes = dict(vocab_size=97, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=52)
    hf = getattr(transformers, f"{kind}ForMaskedLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    if surface == "bridge" and kind == "Roberta":
        pytest.skip("TransformerLens has no bridge of it")
    model = hf if surface == "hf" else booted(hf)
    with pytest.raises(ValueError, match="between|not known|layout was not found"):
        flash_decode(model)
    with pytest.raises(ValueError, match="between"):
        decode_directions(torch.ones(2, 40), model)


def test_a_model_without_an_unembedding_is_refused():
    model = transformers.LlamaModel(families.FAMILIES["llama"].config)
    with pytest.raises(ValueError, match="no unembedding; expected a causal language model"):
        decode_directions(torch.ones(2, 40), model)


def test_an_encoder_and_decoder_are_read_of_the_hugging_face_model_alone():
    config = transformers.T5Config(vocab_size=97, d_model=40, num_layers=2, num_heads=4, d_ff=52, d_kv=10)
    hugging_face = transformers.T5ForConditionalGeneration(config).eval()
    neurons = flash_decode(hugging_face, side="out", k=3)
    x = read(hugging_face).directions(1, "out")
    assert torch.equal(decode_directions(x, hugging_face, k=3).positive.ids[0], neurons.positive.ids[1])
    model = booted(hugging_face)
    with pytest.raises(ValueError, match="an encoder and a decoder; give the Hugging Face model itself"):
        flash_decode(model)
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        decode_directions(torch.ones(2, 40), model)


# What has no hooks, or has them covered


USES = {
    "clamp": lambda model: clamp(model, {"L1N3": 1.0}).__enter__(),
    "activation_stats": lambda model: activation_stats(model, ["a dog"]),
    "clamp_sweep": lambda model: clamp_sweep(model, "L1N3", [1.0], ["a dog"], [5]),
    "mention_rate": lambda model: mention_rate(model, ["a dog"], "dog", {"L1N3": 1.0}, max_new_tokens=2),
    "validate": lambda model: validate(model, {"L1N3": 5}, controls=2, prompts=["a dog"]),
    "jacobian_lens": lambda model: jacobian_lens(model, ["a dog"]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_hugging_face_model_is_refused_where_hooks_are_needed_and_the_advice_works(use):
    if not families.HAS_BRIDGE:
        pytest.skip("TransformerLens 2 has no bridges")
    from transformer_lens.model_bridge import TransformerBridge

    hf = fresh("hf")
    with pytest.raises(TypeError, match=r'boot_transformers\("my/model", hf_model=model, tokenizer=tokenizer\)'):
        use(hf)
    use(TransformerBridge.boot_transformers("my/model", hf_model=hf, tokenizer=families.tokenizer()))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_compiled_model_is_refused_where_hooks_are_needed_and_the_advice_works(use):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(families.build("llama", "bridge"))
    with pytest.raises(ValueError, match="give model._orig_mod"):
        use(compiled)
    use(compiled._orig_mod)


@pytest.mark.parametrize("name", sorted(USES.keys() - {"jacobian_lens"}))
def test_what_is_no_model_is_refused_where_hooks_are_needed(name):
    use = USES[name]
    with pytest.raises(TypeError, match="load_model"):
        use("gpt2")
    with pytest.raises(TypeError, match="expected a HookedTransformer or a TransformerBridge, got Linear"):
        use(nn.Linear(2, 2))
    config = transformers.T5Config(vocab_size=97, d_model=40, num_layers=2, num_heads=4, d_ff=52, d_kv=10)
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        use(booted(transformers.T5ForConditionalGeneration(config).eval()))


@pytest.mark.parametrize("surface", [s for s in families.surfaces() if s in ("bridge", "hooked")])
def test_an_sae_at_the_hook_point_is_named_and_the_advice_works(surface):
    class SAE(nn.Module):
        def forward(self, x):
            return x

    model = families.copied(families.build("llama", surface))
    covered = model.blocks[1].mlp.hook_post
    *owners, own_name = covered.name.split(".")  # on a bridge hook_post is another name of this one
    owner = reduce(getattr, owners, model)
    setattr(owner, own_name, SAE())
    with pytest.raises((ValueError, RuntimeError), match=r"SAE has taken its place.*model.reset_saes\(\)"):
        with clamp(model, {"L1N3": 1.0}):
            model(torch.tensor([[3, 4]]))
    setattr(owner, own_name, covered)  # what reset_saes does
    with clamp(model, {"L1N3": 1.0}):
        model(torch.tensor([[3, 4]]))


def test_a_file_where_a_folder_is_meant_and_the_other_way_round(tmp_path):
    fresh("hf").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    for use in (flash_decode, lambda path: load_model(str(path))):
        with pytest.raises(ValueError, match=f"a file; expected a model's folder, give {tmp_path}"):
            use(file)
    flash_decode(file.parent).save(tmp_path / "map")
    with pytest.raises(FileNotFoundError, match="a folder; expected a file that .save wrote"):
        NeuronMap.load(tmp_path)
    assert len(NeuronMap.load(tmp_path / "map")) == 104


@needs_hooked
def test_an_encoder_of_TransformerLens_is_refused():
    from transformer_lens import HookedEncoder, HookedTransformerConfig

    config = HookedTransformerConfig(**(SIZES | dict(act_fn="gelu", normalization_type="LN")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedEncoder(config, move_to_device=False)
    with pytest.raises(ValueError, match="between its last block and the unembedding"):
        flash_decode(model)
