"""Maps straight from checkpoints equal those of the same models in memory; what is broken is refused."""

import copy
import dataclasses
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import families
from tests.families import D_MLP, D_VOCAB, FAMILIES, N_LAYERS, N_TOKENS, sides
from tl_flash import ExpertNeuron, NeuronMap, compare, decode_directions, flash_decode, load_model
from tl_flash.decode import job
from tl_flash.weights import combined, digest, layout, read, read_unembedding
from tl_flash.weights.files import Files
from tl_flash.weights.formats.safetensors import INDEX, SINGLE, Shards

K = 4
PADDING = range(N_TOKENS, D_VOCAB)  # surfaces that hold a tokenizer never report these
SHARD = "60KB"  # at least two shards a model


def saved(model, folder, tokenizer=None, shard=SHARD):
    model.save_pretrained(folder, max_shard_size=shard)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each family, in shards."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = saved(families.hf_model(name), tmp_path_factory.mktemp(name))
            assert len(list(made[name].glob("*.safetensors"))) > 1
        return made[name]

    return folder


@pytest.fixture
def llama(folders, tmp_path):
    """A copy of the Llama's folder, to be broken."""
    return shutil.copytree(folders("llama"), tmp_path / "llama")


def assert_same_map(given, expected):
    """Equal to the last bit but for the name of the model."""
    for name in ("norm", "mean", "std", "kurtosis"):
        assert torch.equal(getattr(given, name), getattr(expected, name)), name
    for pole in ("positive", "negative"):
        for name in ("ids", "logits", "log_z", "write_z"):
            assert torch.equal(getattr(getattr(given, pole), name), getattr(getattr(expected, pole), name)), name
    assert torch.equal(given.null.z, expected.null.z) and torch.equal(given.null.kurtosis, expected.null.kurtosis)
    assert dataclasses.replace(given.source, model="") == dataclasses.replace(expected.source, model="")
    assert (given.n_layers, given.layers, given.n_experts) == (expected.n_layers, expected.layers, expected.n_experts)


# The same as in memory


def mamba(folder, **changes):
    """A model without MLPs, in a folder."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=97, hidden_size=40, num_hidden_layers=2, state_size=4, **changes)
    model = transformers.MambaForCausalLM(config).eval()
    torch.nn.init.uniform_(model.backbone.norm_f.weight, 0.5, 1.5)
    return model, saved(model, folder)


@pytest.mark.parametrize("tied", [False, True])
def test_an_unembedding_is_read_of_a_checkpoint_without_mlps(tmp_path, tied):
    model, folder = mamba(tmp_path, tie_word_embeddings=tied)
    given, expected = read_unembedding(folder), read_unembedding(model)
    assert torch.equal(given.W_U, expected.W_U) and torch.equal(given.final_gain, expected.final_gain)
    assert (given.centre, given.final_norm, given.d_model) == (False, True, 40)
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    maps = [decode_directions(x, source, k=K) for source in (folder, model)]
    assert torch.equal(maps[0].positive.ids, maps[1].positive.ids)
    assert torch.equal(maps[0].positive.logits, maps[1].positive.logits)


@pytest.mark.parametrize("name, side", [(name, side) for name in FAMILIES for side in sides(name)])
def test_a_checkpoint_gives_the_map_of_its_model(folders, name, side):
    for fold_ln in (True, False):
        given = flash_decode(str(folders(name)), side=side, k=K, fold_ln=fold_ln)
        assert_same_map(given, flash_decode(families.hf_model(name), side=side, k=K, fold_ln=fold_ln))
    assert given.source.model == str(folders(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_is_read_as_it_is(tmp_path, dtype):
    saved(copy.deepcopy(families.hf_model("gemma2")).to(dtype), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    given = flash_decode(tmp_path, k=K)
    assert_same_map(given, flash_decode(model, k=K))
    assert given.source.dtype == str(dtype).removeprefix("torch.")


def test_one_file_or_many_makes_no_difference(folders, tmp_path):
    single = saved(families.hf_model("llama"), tmp_path, shard="1GB")
    assert [path.name for path in single.glob("*.safetensors")] == ["model.safetensors"]
    assert_same_map(flash_decode(single, k=K), flash_decode(folders("llama"), k=K))


def test_the_tokenizer_beside_the_weights_names_the_tokens(tmp_path, tokenizer):
    saved(families.hf_model("llama"), tmp_path, tokenizer)
    given = flash_decode(tmp_path, k=K, tokens=[" dog"])
    assert given.vocab.strings == flash_decode(families.hf_model("llama"), tokenizer=tokenizer).vocab.strings
    assert int(given.positive.ids.max()) < len(tokenizer), "padded ids are never reported"
    assert given.find(" dog") and " dog" in given.tracked


def test_layers_can_be_chosen(folders):
    whole, second = flash_decode(folders("phi3"), k=K), flash_decode(folders("phi3"), k=K, layers=[1])
    assert second.layers == (1,) and second.n_layers == N_LAYERS
    assert torch.equal(second.positive.ids[0], whole.positive.ids[1])


def test_directions_can_be_decoded_against_a_checkpoint(folders):
    x = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    given, expected = (decode_directions(x, source, k=K) for source in (folders("olmo2"), families.hf_model("olmo2")))
    assert torch.equal(given.positive.ids, expected.positive.ids)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_small_blocks_change_no_row(folders, monkeypatch, name):
    whole = flash_decode(folders(name), k=K)
    monkeypatch.setattr(job, "BLOCK", 20)  # several units a layer
    cut = flash_decode(folders(name), k=K)
    for pole in ("positive", "negative"):
        assert torch.equal(getattr(cut, pole).ids, getattr(whole, pole).ids)
        assert torch.equal(getattr(cut, pole).logits, getattr(whole, pole).logits)
    assert torch.allclose(cut.null.z, whole.null.z, atol=1e-5) and torch.allclose(cut.std, whole.std, rtol=1e-5)


# Names that published checkpoints use


def rename(folder, change):
    """Rewrite a folder in one file, its tensors renamed (None: left out)."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= {change(name): tensor for name, tensor in load_file(path).items() if change(name)}
        path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    save_file(tensors, folder / SINGLE)
    return folder


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("gpt2", "transformer.", ""),
        ("neox", "embed_out.", "lm_head."),
        ("mixtral", "model.layers", "model.layers"),
    ],
)
def test_other_published_names(folders, tmp_path, name, old, new):
    folder = rename(shutil.copytree(folders(name), tmp_path / "x"), lambda tensor: tensor.replace(old, new, 1))
    assert_same_map(flash_decode(folder, k=K), flash_decode(folders(name), k=K))


@pytest.mark.parametrize("root", ["language_model.model.", "model.language_model."])
def test_gemma_3_with_a_vision_tower(folders, tmp_path, root):
    folder = rename(shutil.copytree(folders("gemma3"), tmp_path / "x"), lambda name: name.replace("model.", root, 1))
    text = json.loads((folder / "config.json").read_text())
    configure(
        folder, architectures=["Gemma3ForConditionalGeneration"], text_config=text, hidden_size=..., vocab_size=...
    )
    given, expected = flash_decode(folder, k=K), flash_decode(folders("gemma3"), k=K)
    assert torch.equal(given.positive.ids, expected.positive.ids)
    assert torch.equal(given.positive.logits, expected.positive.logits)


def test_what_transformers_saves_of_gemma_3_with_a_vision_tower(tmp_path):
    text = dict(families.FAMILIES["gemma3"].config.to_dict(), tie_word_embeddings=True)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    assert_same_map(flash_decode(saved(model, tmp_path), k=K), flash_decode(model, k=K))


# The hub


class Hub:
    """Stands for the hub: copies files from a folder into a cache, and counts."""

    def __init__(self, folder, cache):
        self.folder, self.cache, self.fetched = folder, cache, []
        cache.mkdir()

    def __call__(self, repo_id, filename, **_):
        if not (self.folder / filename).is_file():
            raise EntryNotFoundError(f"no {filename}")
        self.fetched.append(filename)
        return str(shutil.copy2(self.folder / filename, self.cache))

    @property
    def shards(self):
        return sorted(name for name in self.fetched if name.endswith(".safetensors"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(saved(families.hf_model("llama"), tmp_path / "repo", shard="20KB"), tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    return hub


def test_a_model_on_the_hub(hub, folders):
    assert_same_map(flash_decode("tiny/llama", k=K), flash_decode(folders("llama"), k=K))
    assert len(hub.fetched) == len(set(hub.fetched)), "each file once"


def test_only_shards_that_are_needed_are_fetched(hub):
    where = json.loads((hub.folder / INDEX).read_text())["weight_map"]
    flash_decode("tiny/llama", k=K, layers=[0])
    parts = ("mlp", "post_attention_layernorm")
    needed = {
        file for name, file in where.items() if name.startswith("model.layers.0.") and name.split(".")[3] in parts
    }
    needed |= {where["lm_head.weight"], where["model.norm.weight"]}
    assert hub.shards == sorted(needed) and len(needed) < len(set(where.values()))


def test_a_hub_out_of_reach_is_told(monkeypatch):
    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(FileNotFoundError, match="tiny/llama: no config.json.*hub that can be reached"):
        flash_decode("tiny/llama")


def test_a_model_that_the_hub_does_not_have_is_told(monkeypatch):
    def missing(*_, **__):
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(FileNotFoundError, match="tiny/llama: no such folder, and the hub has no such model"):
        flash_decode("tiny/llama")


# Refusals


def refused(folder, message, error=ValueError, **options):
    with pytest.raises(error, match=message):
        flash_decode(folder, **options)


def test_no_such_folder_is_refused(tmp_path):
    refused(tmp_path / "none", "no such folder", FileNotFoundError)
    refused("./none", "no such folder", FileNotFoundError)
    refused("", "'': no such folder", FileNotFoundError)
    refused("a--b", "no name that the hub could have", FileNotFoundError)
    refused("x" * 300, "no name that the hub could have", FileNotFoundError)
    refused(tmp_path / ("x" * 300), "no such folder", FileNotFoundError)
    refused(tmp_path, "no config.json", FileNotFoundError)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("", FileNotFoundError, "'': no such folder"),
        ("./none", FileNotFoundError, "no such folder"),
        (3, TypeError, "a folder or a name on the hub, got int"),
    ],
)
def test_a_model_that_is_no_model_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        load_model(source)


def test_a_missing_shard_is_refused(llama):
    shard = max(llama.glob("*.safetensors"))
    shard.unlink()
    refused(llama, f"no {shard.name}; expected every safetensors file", FileNotFoundError)


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_truncated_shard_is_refused(llama, keep):
    shard = max(llama.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(llama, f"{shard.name}: truncated")


def test_a_class_that_transformers_lacks_is_refused(llama):
    refused(configure(llama, architectures=["NoSuchModel"]), r"a class of transformers .*, got \['NoSuchModel'\]; load")
    refused(configure(llama, architectures=...), "got None; load the model with the code that it came with")
    refused(configure(llama, architectures="LlamaForCausalLM"), "expected architectures to list .*, got 'LlamaForC")


def test_a_model_without_mlps_is_refused(tmp_path):
    _, folder = mamba(tmp_path)
    refused(folder, "MambaForCausalLM: no layer's neurons can be read: no MLP")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vocab_size=...), r"lm_head.weight is \(97, 40\), expected \(32000, 40\)"),
        (dict(vocab_size="97"), "config.json: no config of LlamaForCausalLM|its layout was not found"),
        (dict(hidden_size=...), r"lm_head.weight is \(97, 40\), expected \(97, 4096\)"),
        (dict(vocab_size=98), r"lm_head.weight is \(97, 40\), expected \(98, 40\)"),
        (dict(intermediate_size=50), r"mlp.up_proj.weight is \(52, 40\), expected \(50, 40\)"),
        (dict(num_hidden_layers=3), "no tensor model.layers.2.post_attention_layernorm.weight"),
        (dict(quantization_config={"bits": 4}), "quantised"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(llama, changes, message):
    refused(configure(llama, **changes), message)


def test_a_broken_config_is_refused(llama):
    (llama / "config.json").write_text('{"vocab_size": 9')
    refused(llama, "config.json: truncated, or no JSON")
    for text in (b"[]", b"null", b"3"):
        (llama / "config.json").write_bytes(text)
        refused(llama, "config.json: expected a JSON object, got ")
        with pytest.raises(ValueError, match="config.json: expected a JSON object"):
            load_model(llama)
    (llama / "config.json").write_bytes(b'{"a": "\xff"}')
    refused(llama, "config.json: truncated, or no JSON .*utf-8")


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {"lm_head.weight": 3}}])
def test_a_broken_index_is_refused(llama, index):
    (llama / INDEX).write_text(json.dumps(index))
    refused(llama, f"{INDEX} has no weight_map of tensors to files")


@pytest.mark.parametrize("text", ["garbage", "[]", "{}", '{"model": {"type": "BPE"}}', '{"model": 3}'])
def test_a_broken_tokenizer_is_refused(llama, text):
    (llama / "tokenizer.json").write_text(text)
    refused(llama, "tokenizer.json: (truncated, or no JSON|expected a JSON object|holds no vocabulary)")
    with pytest.raises(ValueError, match="tokenizer.json: "):
        load_model(llama)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_misshapen_tensor_is_refused(llama, name):
    rename(llama, str)
    tensors = load_file(llama / SINGLE)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, llama / SINGLE)
    refused(llama, f"{name} is ")


def test_a_missing_tensor_is_refused(llama, folders, tmp_path):
    index = json.loads((llama / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    (llama / INDEX).write_text(json.dumps(index))
    refused(llama, "no tensor model.norm.weight .*which model.safetensors.index.json expects there")
    other = rename(shutil.copytree(folders("llama"), tmp_path / "x"), lambda name: "" if "lm_head" in name else name)
    refused(other, "no tensor lm_head.weight")


def test_quantised_tensors_are_refused(llama):
    rename(llama, str)
    tensors = load_file(llama / SINGLE)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, llama / SINGLE)
    refused(llama, "layer 1: expected floating-point weights, got torch.float8_e4m3fn")


def test_weights_that_are_not_finite_are_refused(llama):
    rename(llama, str)
    tensors = load_file(llama / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][17, 3] = torch.nan
    save_file(tensors, llama / SINGLE)
    refused(llama, r"layer 1: W_in holds 1 NaN or infinite values, the first at \(17, 3\)")
    assert flash_decode(llama, layers=[0]).layers == (0,)


def test_two_unembeddings_of_a_tied_model_are_refused(llama):
    refused(configure(llama, tie_word_embeddings=True), "lm_head.weight and model.embed_tokens.weight differ")


def test_a_pickle_is_refused_with_the_way_out(llama):
    rename(llama, str)
    (llama / SINGLE).rename(llama / "pytorch_model.bin")
    refused(llama, f'pickle.*expected safetensors.*from_pretrained\\("{llama}".*save_pretrained')


# Mixtures of experts


@pytest.fixture(scope="module")
def moe():
    """A Qwen3-MoE: layer 0 has 4 experts of 20 neurons, layer 1 is dense."""
    config = transformers.Qwen3MoeConfig(
        **families._GROUPED,
        head_dim=12,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        mlp_only_layers=[1],
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 and "norm" in name else parameter.normal_(std=0.3)
    return model


def expert_directions(model, layer, side):
    """The folded directions of every expert's neurons, from the module itself."""
    block = model.model.layers[layer]
    experts = block.mlp.experts
    if hasattr(experts, "gate_up_proj"):
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        matrix = {"in": up, "gate": gate, "out": experts.down_proj.detach().mT}[side]
    else:  # transformers 4
        projection = {"in": "up_proj", "gate": "gate_proj", "out": "down_proj"}[side]
        matrix = torch.stack([getattr(expert, projection).weight.detach() for expert in experts])
        matrix = matrix.mT if side == "out" else matrix
    gain = 1 if side == "out" else block.post_attention_layernorm.weight.detach()
    return (matrix * gain).flatten(0, 1)


@pytest.mark.parametrize("side", ["in", "gate", "out"])
def test_experts_are_read_one_after_the_other(moe, side, tmp_path):
    folder = saved(moe, tmp_path)
    names = Shards(Files(folder)).where
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in names, "the published layout"
    for weights in (read(moe), read(folder)):
        assert torch.equal(weights.directions(0, side), expert_directions(moe, 0, side))
        assert torch.equal(weights.directions(0, side, neurons=slice(15, 43)), expert_directions(moe, 0, side)[15:43])
    given = flash_decode(folder, side=side, k=K, layers=[0])
    assert_same_map(given, flash_decode(moe, side=side, k=K, layers=[0]))
    plain = decode_directions(expert_directions(moe, 0, side), moe, k=K)
    assert torch.equal(given.positive.ids[0], plain.positive.ids[0])


@pytest.mark.skipif(not families.STACKS_EXPERTS, reason="transformers 5 stacks them")
def test_stacked_experts_are_read_alike(moe, tmp_path):
    folder = saved(moe, tmp_path)
    expected = flash_decode(folder, k=K, layers=[0])
    rename(folder, lambda name: None if ".experts." in name else name)
    tensors = load_file(folder / SINGLE)
    stacked = {f"model.layers.0.mlp.experts.{name}": getattr(moe.model.layers[0].mlp.experts, name).detach().clone()
               for name in ("gate_up_proj", "down_proj")}  # fmt: skip
    save_file(tensors | stacked, folder / SINGLE)
    assert_same_map(flash_decode(folder, k=K, layers=[0]), expected)


def test_layers_of_several_widths_are_decoded_apart(moe, tmp_path):
    folder = saved(moe, tmp_path)
    for model in (moe, folder):
        with pytest.raises(ValueError, match="layer 1 has 52 neurons, layer 0 has 4 experts of 20 neurons; decode"):
            flash_decode(model)
        dense = flash_decode(model, layers=[1])
        assert dense.n_experts is None and dense.d_mlp == D_MLP and str(dense["L1N3"].neuron) == "L1N3"


def test_a_missing_expert_is_refused(moe, tmp_path):
    folder = rename(saved(moe, tmp_path), lambda name: None if ".experts.2.down" in name else name)
    refused(folder, "no tensor model.layers.0.mlp.experts.2.down_proj.weight", layers=[0])


@pytest.fixture(scope="module")
def experts_map():
    return flash_decode(families.hf_model("mixtral"), k=K, tokenizer=families.tokenizer())


def test_neurons_of_experts_have_names(experts_map, tmp_path):
    assert (experts_map.n_experts, experts_map.d_mlp, len(experts_map)) == (4, 4 * D_MLP, N_LAYERS * 4 * D_MLP)
    reading = experts_map["L1E3N17"]
    assert reading.neuron == ExpertNeuron(1, 3, 17) == experts_map[1, 3, 17].neuron and "L1E3N17" in str(reading)
    row, column = experts_map.place("L1E3N17")
    assert (row, column) == (1, 3 * D_MLP + 17) and experts_map.neuron(row, column) == reading.neuron
    assert reading.positive[0].logit == float(experts_map.positive.logits[1, column, 0])
    assert "4 experts x 52 neurons" in repr(experts_map)
    for hits in (experts_map.find(" dog"), experts_map.specialised(5, quantile=0.5)):
        for hit in hits:
            assert experts_map[hit.neuron].neuron == hit.neuron and "E" in str(hit.neuron)
            assert hits.token_id(hit) == int(experts_map.positive.vocab.id(hit.token))
    frame = experts_map.to_frame()
    assert list(frame["neuron"][:2]) == ["L0E0N0"] * 2 and frame["neuron"].iloc[-1] == f"L1E3N{D_MLP - 1}"
    assert len(frame) == 2 * len(experts_map) and frame["neuron"].nunique() == len(experts_map)
    here = frame[(frame["neuron"] == "L1E3N17") & (frame["pole"] == "positive")].iloc[0]
    assert (here["layer"], here["expert"], here["index"]) == (1, 3, 17) and here["logit"] == reading.positive[0].logit
    experts_map.save(tmp_path / "map.safetensors")
    loaded = NeuronMap.load(tmp_path / "map.safetensors")
    assert loaded.n_experts == 4 and str(loaded["L1E3N17"]) == str(reading)
    assert compare(loaded, experts_map).agreement == 1


@pytest.mark.parametrize("neuron", ["L1N17", "L1E4N0", f"L1E0N{D_MLP}", "L2E0N0", (1, 17)])
def test_neurons_that_a_map_of_experts_does_not_hold(experts_map, neuron):
    with pytest.raises(KeyError, match=r"layers \[0, 1\], experts 0 to 3 of each, neurons 0 to 51"):
        experts_map[neuron]


def test_a_dense_map_holds_no_experts(folders):
    with pytest.raises(KeyError, match="L1E0N3"):
        flash_decode(folders("llama"), k=1)["L1E0N3"]


def test_maps_of_other_numbers_of_experts_are_not_compared(experts_map):
    other = dataclasses.replace(experts_map, n_experts=2)
    with pytest.raises(ValueError, match="same number of experts as a, 4; got 2"):
        compare(experts_map, other)


@pytest.mark.parametrize("surface", [surface for surface in families.surfaces() if surface != "hf"])
@pytest.mark.parametrize("side", ["in", "gate", "out"])
def test_experts_are_read_alike_on_every_surface(surface, side):
    given, expected = (read(families.build("mixtral", name)) for name in (surface, "hf"))
    for layer in range(N_LAYERS):
        directions = expected.directions(layer, side)
        assert torch.allclose(given.directions(layer, side), directions, rtol=0, atol=1e-6)
    maps = [
        flash_decode(families.build("mixtral", name), side=side, k=K, ignore_tokens=PADDING) for name in (surface, "hf")
    ]
    assert maps[0].n_experts == 4 and (maps[0].positive.ids == maps[1].positive.ids).float().mean() > 0.999


# Reading


def test_fingerprints_are_of_every_weight_decoded(folders):
    weights = read(folders("llama"))
    digests = [digest(weights.W_U.T), *(digest(weights.layer(layer).W_in) for layer in range(N_LAYERS))]
    assert flash_decode(folders("llama"), k=1).source.fingerprint == combined(digests)


def test_a_layout_needs_a_config_alone_however_large_the_model(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126, num_attention_heads=128, vocab_size=128_256
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    found = layout(tmp_path)
    assert found.readable == list(range(126)) and found.layers[0].neurons[0].up.tensor == "mlp.up_proj.weight"
