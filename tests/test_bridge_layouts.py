"""Bridges of classes whose norms have other names, flags or places than Llama's are read as the model within is."""

import copy

import pytest
import torch
import transformers
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge

from tests import classes, families
from tl_flash import weights

READ = """
    BitNetForCausalLM CohereForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM GPTJForCausalLM Gemma4ForCausalLM
    GemmaForCausalLM GraniteMoeHybridForCausalLM MuseGlimmerForConditionalGeneration NemotronForCausalLM
    NemotronHForCausalLM Olmo3ForCausalLM OlmoHybridForCausalLM Qwen2MoeForCausalLM Qwen3_5ForCausalLM
    RecurrentGemmaForCausalLM
""".split()


def bridge_of(name, compatible, dtype=torch.float32):
    if not hasattr(transformers, name) or name not in SUPPORTED_ARCHITECTURES:
        pytest.skip(f"transformers {transformers.__version__} or TransformerLens has no {name}")
    double = classes.model(name)
    model = type(double)(copy.deepcopy(double.config)).to(dtype).eval()
    model.load_state_dict(double.state_dict())
    model.config.architectures = [name]
    truth = weights.read(model)
    directions = {
        (layer, side): truth.directions(layer, side).clone()
        for layer in weights.layout(model).readable
        for side in truth.sides
    }
    made = TransformerBridge.boot_transformers(
        "tiny/x", hf_model=model, tokenizer=families.tokenizer(), device="cpu", dtype=dtype
    )
    if compatible:
        made.enable_compatibility_mode(disable_warnings=True)
    return made, directions


@pytest.mark.filterwarnings("ignore:.*ArchitectureAdapter does not support:UserWarning")
@pytest.mark.parametrize("compatible", [False, True], ids=["raw", "compatible"])
@pytest.mark.parametrize("name", READ)
def test_a_bridge_is_read_as_the_model_within(name, compatible):
    bridge, directions = bridge_of(name, compatible)
    read = weights.read(bridge)
    for (layer, side), truth in directions.items():
        torch.testing.assert_close(read.directions(layer, side), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("name", ["BertLMHeadModel", "BertForMaskedLM"])
def test_a_head_of_several_layers_is_refused_in_a_bridge(name):
    model = type(classes.model(name))(copy.deepcopy(classes.model(name).config)).float().eval()
    model.config.architectures = [name]
    made = TransformerBridge.boot_transformers("tiny/x", hf_model=model, tokenizer=families.tokenizer(), device="cpu")
    with pytest.raises(ValueError, match="between the last layer and the unembedding is more than a norm"):
        weights.read(made)


@pytest.mark.parametrize("name", ["CohereForCausalLM", "GraniteForCausalLM"])
def test_the_logits_factor_in_a_bridge_is_that_of_its_class_to_the_bit(name):
    bridge, _ = bridge_of(name, compatible=False, dtype=torch.bfloat16)
    within = bridge.original_model
    read, truth = weights.read(bridge), weights.read(type(within)(within.config))
    factor = truth.final_gain.max()  # of a new norm, which scales by 1
    torch.testing.assert_close(read.final_gain, within.model.norm.weight.detach().float() * factor, rtol=0, atol=0)


def test_a_bridges_shared_expert_that_does_not_multiply_by_its_weight_is_refused():
    bridge, directions = bridge_of("Qwen2MoeForCausalLM", compatible=False)
    layer = max(layer for layer, _ in directions)
    linear = bridge.original_model.model.layers[layer].mlp.shared_expert.up_proj
    linear = getattr(linear, "original_component", linear)
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="shared_expert.up_proj: a .* does not multiply by the weight it holds"):
        weights.read(bridge).layer(layer)
