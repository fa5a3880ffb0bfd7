"""What llama.cpp calls things, in Hugging Face's terms: the config of a GGUF file, and the names of its tensors."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
from gguf import MODEL_TENSOR
from huggingface_hub.errors import StrictDataclassError

from tl_flash.weights.files import Files
from tl_flash.weights.formats.gguf import Header
from tl_flash.weights.found import Found
from tl_flash.weights.layouts import LayerLayout, Layout, Neurons, Norm, Place

EMBEDDING, UNEMBEDDING = (
    f"{gguf.TENSOR_NAMES[kind]}.weight" for kind in (MODEL_TENSOR.TOKEN_EMBD, MODEL_TENSOR.OUTPUT)
)
_ROOT = "blk."
_NAMES = {
    "dense": (MODEL_TENSOR.FFN_UP, MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_DOWN),
    "routed": (MODEL_TENSOR.FFN_UP_EXP, MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_DOWN_EXP),
    "shared": (MODEL_TENSOR.FFN_UP_SHEXP, MODEL_TENSOR.FFN_GATE_SHEXP, MODEL_TENSOR.FFN_DOWN_SHEXP),
}
"""Up, gate and down."""


def config_of(header: Header, names: Iterable[str], d_vocab: int) -> tuple[type, Any]:
    """The class and config of a file's model, as transformers converts them, or by the config.json beside it.

    Args:
        header: of the file, or of the first of its parts.
        names: of all its tensors.
        d_vocab: rows of its embedding.

    Raises:
        ValueError: transformers does not know the architecture, or it is no decoder-only model.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    arch = header.fields.get("general.architecture")
    try:
        if arch == "llama" and header.fields.get("llama.expert_count"):
            raise ValueError("it takes a mixture of experts of this architecture, such as Mixtral, for a dense model")
        config = _converted(header, names, d_vocab)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, StrictDataclassError) as error:
        config = _beside(header.path)
        if config is None:
            raise ValueError(
                f"{header.path}: of architecture {arch!r}, whose config transformers {transformers.__version__} does "
                f"not read from GGUF ({error}); put the model's config.json beside the file"
            ) from error
    config.get_text_config().vocab_size = d_vocab
    classes: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in classes:
        raise ValueError(f"{header.path}: of architecture {arch!r}; expected a decoder-only language model")
    model_class = classes[type(config)]
    config.architectures = [model_class.__name__]
    return model_class, config


def _converted(header: Header, names: Iterable[str], d_vocab: int) -> Any:
    """The config, converted from a copy of the header without its vocabulary: the package `gguf`, through which
    transformers reads the rest, makes an array of each of its tokens, in half a minute for 262,144.
    """
    from transformers import AutoConfig

    sized = f"{header.fields['general.architecture']}.vocab_size"
    own = _text(sized) + struct.pack("<II", int(gguf.GGUFValueType.UINT32), d_vocab)
    records = header.records | {sized: own}
    infos, n = b"", 0
    for n, name in enumerate(names, start=1):
        infos += _text(name) + struct.pack("<IQIQ", 1, 1, int(gguf.GGMLQuantizationType.F32), 32 * (n - 1))
    start = b"GGUF" + struct.pack("<IQQ", gguf.GGUF_VERSION, n, len(records)) + b"".join(records.values()) + infos
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "header.gguf").write_bytes(start + bytes(-len(start) % 32 + 32 * n))
        return AutoConfig.from_pretrained(folder, gguf_file="header.gguf")


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _beside(path: Path) -> Any:
    from transformers import AutoConfig

    files = Files(path.parent)
    if files.find("config.json") is None:
        return None
    files.json("config.json")
    return AutoConfig.from_pretrained(path.parent)


def gguf_layout(seen: Found, tensors: Container[str], arch: str) -> Layout:
    """The layout of a class by the names that llama.cpp gives its tensors.

    Its norms multiply by their weight alone: where a model's do by 1 + weight, the file holds the sum. Its matrices are
    all kept [output, input].

    Raises:
        ValueError: an architecture or a norm that the package `gguf` has no name for.
    """
    names = _Names(arch, len(seen.saved.layers))
    layers = [
        replace(
            layer,
            neurons=tuple(
                _neurons(one, _kind(layer, one), f"{_ROOT}{at}.", tensors) for one in seen.layout.layers[at].neurons
            ),
            pre=layer.pre and names.norm(layer.pre, seen.saved.prefix(at), f"{_ROOT}{at}."),
            post=tuple(names.norm(norm, seen.saved.prefix(at), f"{_ROOT}{at}.") for norm in layer.post),
        )
        for at, layer in enumerate(seen.saved.layers)
    ]
    return replace(
        seen.saved,
        root=_ROOT,
        layers=tuple(layers),
        final=seen.saved.final and names.norm(seen.saved.final, "", ""),
        unembedding=Place(UNEMBEDDING if UNEMBEDDING in tensors else EMBEDDING, transposed=False),
        shared_with=(),
    )


def _kind(layer: LayerLayout, neurons: Neurons) -> str:
    if neurons.routed:
        return "routed"
    return "shared" if any(other.routed for other in layer.neurons) else "dense"


def _neurons(neurons: Neurons, kind: str, prefix: str, tensors: Container[str]) -> Neurons:
    up, gate, down = (gguf.TENSOR_NAMES[name].removeprefix("blk.{bid}.") + ".weight" for name in _NAMES[kind])
    both = gguf.TENSOR_NAMES[MODEL_TENSOR.FFN_GATE_UP_EXP].removeprefix("blk.{bid}.") + ".weight"
    fused = both if prefix + both in tensors else up
    separate = neurons.gate is None or neurons.up.parts == 1 or prefix + gate in tensors

    def place(own: Place, name: str) -> Place:
        return Place(name, False) if separate else replace(own, tensor=fused, transposed=False)

    return replace(
        neurons,
        up=place(neurons.up, up),
        gate=neurons.gate and place(neurons.gate, gate),
        down=Place(down, transposed=True),
    )


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in a file, as transformers converts it; None where it holds none."""
    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    kind = Header.of(path).fields.get("tokenizer.ggml.model")
    if kind is None:
        return None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    if kind == "gpt2":  # byte-level, of which transformers 4 takes a Llama's for SentencePiece's, without the spaces
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class _Names:
    """The package's table of an architecture's names."""

    def __init__(self, arch: str, n_layers: int) -> None:
        known: Mapping[str, Any] = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if arch not in known:
            raise ValueError(f"architecture {arch!r}: the package gguf has no names for it; update it")
        self._arch, self._map = arch, gguf.get_tensor_name_map(known[arch], n_layers)

    def norm(self, norm: Norm, prefix: str, new: str) -> Norm:
        """A norm under its name, within a layer or by its whole name."""
        if norm.weight is None:
            return norm
        whole = (prefix + norm.weight).removesuffix(".weight")
        found = self._map.get_name(whole) or self._map.get_name(whole.partition(".")[2])
        if found is None or not found.startswith(new):
            raise ValueError(f"{whole}: the package gguf has no name for it in architecture {self._arch!r}")
        return replace(norm, weight=f"{found.removeprefix(new)}.weight", offset=0.0)
