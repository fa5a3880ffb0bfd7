"""The main job on a real trained model, on every surface of TransformerLens that is here."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import families
from tl_flash import NeuronMap, flash_decode, load_model


def surfaces():
    there = {"bridge": families.HAS_BRIDGE, "hooked": families.HAS_HOOKED_TRANSFORMER}
    return [surface for surface, is_there in there.items() if is_there]


@pytest.fixture(scope="module")
def hugging_face(stories_path):
    return AutoModelForCausalLM.from_pretrained(stories_path, dtype=torch.float32)


@pytest.fixture(scope="module", params=[*surfaces(), "hf"])
def model(request, stories_path, hugging_face):
    return hugging_face if request.param == "hf" else load_model(stories_path, surface=request.param)


def brute_force(hugging_face, side, layer):
    """All scores of one layer in float64, straight from the checkpoint's tensors."""
    state = {name: tensor.double() for name, tensor in hugging_face.state_dict().items()}
    prefix = f"model.layers.{layer}."
    W_U = state["model.norm.weight"][:, None] * state["lm_head.weight"].T
    if side == "out":
        x = state[f"{prefix}mlp.down_proj.weight"].T
    else:
        part = {"in": "up", "gate": "gate"}[side]
        x = state[f"{prefix}mlp.{part}_proj.weight"] * state[f"{prefix}post_attention_layernorm.weight"]
    scores = x @ W_U
    return scores - scores.mean(-1, keepdim=True)


@pytest.mark.parametrize("side", ["in", "gate", "out"])
def test_ids_are_those_of_a_float64_brute_force(model, hugging_face, side):
    neurons = flash_decode(model, side=side, k=7)
    for layer in range(5):
        scores = brute_force(hugging_face, side, layer)
        for pole, sign in (("positive", 1), ("negative", -1)):
            ids = getattr(neurons, pole).ids[layer].long()
            order = (sign * scores).argsort(descending=True, stable=True)[:, :7]
            differ = ids != order
            # Surfaces fold in float32, so scores may tie there that differ by rounding in float64.
            gap = (scores.gather(1, ids) - scores.gather(1, order)).abs()
            assert float((gap / scores.std(-1, keepdim=True))[differ].max() if differ.any() else 0) < 2e-6
            assert differ.float().mean() < 1e-3


def test_the_map_does_not_depend_on_the_surface(model, hugging_face):
    neurons, plain = flash_decode(model, k=5), flash_decode(hugging_face, k=5)
    assert (neurons.positive.ids == plain.positive.ids).float().mean() > 0.999
    assert torch.allclose(neurons.positive.probs, plain.positive.probs, rtol=1e-3, atol=1e-6)
    assert torch.allclose(neurons.positive.write_z, plain.positive.write_z, atol=1e-3)
    assert torch.allclose(neurons.null.z, plain.null.z, atol=1e-3)


@pytest.mark.parametrize("surface", surfaces())
def test_decode_and_show_from_the_shell(surface, stories_path, tmp_path):
    path = tmp_path / "map.safetensors"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}

    def shell(*argv):
        command = [sys.executable, "-W", "ignore", "-m", "tl_flash", *map(str, argv)]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    assert "5 layers x 172 neurons" in shell("decode", stories_path, "-o", path, "--surface", surface)
    assert "positive pole" in shell("show", path, "L2N7")
    assert len(NeuronMap.load(path)) == 5 * 172
