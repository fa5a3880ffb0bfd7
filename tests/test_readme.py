"""Every Python block of README runs, in order; a small model of random weights stands for those on the hub."""

import re
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

from tests import families
from tl_flash import demo

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SIZES = dict(hidden_size=24, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=2, vocab_size=2560)

pytestmark = pytest.mark.skipif(not families.HAS_BRIDGE, reason="README begins with a bridge")


def write(model, folder):
    model.save_pretrained(folder)
    demo.load("base", surface="bridge").tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Folders of a dense model, as deep and wide as README's neurons need, and of a mixture."""
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, intermediate_size=1280))
    mixture = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, intermediate_size=32, num_local_experts=6)
    )
    models = {"dense": dense, "mixture": mixture}
    return {name: write(model.eval(), tmp_path_factory.mktemp(name)) for name, model in models.items()}


@pytest.fixture
def offline(stand_ins, monkeypatch, tmp_path):
    """Names on the hub lead to the stand-ins, files are written to an empty folder."""
    from transformer_lens.model_bridge import TransformerBridge

    boot = TransformerBridge.boot_transformers

    def download(name, file):
        path = stand_ins["mixture" if "Mixtral" in name else "dense"] / file
        if not path.is_file():
            raise huggingface_hub.errors.EntryNotFoundError(file)
        return str(path)

    monkeypatch.setattr(
        TransformerBridge, "boot_transformers", lambda name, **options: boot(stand_ins["dense"], **options)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/folder").symlink_to(stand_ins["dense"])


def test_the_blocks_run_one_after_the_other(offline):
    names = {name: demo.load(name) for name in demo.MODELS}
    for block in BLOCKS:
        with warnings.catch_warnings():
            exec(compile(block, "README.md", "exec"), names)  # noqa: S102
