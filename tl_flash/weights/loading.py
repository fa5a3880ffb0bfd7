"""Load a model through TransformerLens, to clamp and to measure; weights alone are read without it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tl_flash.devices import device_of, dtype_of
from tl_flash.weights.checkpoint import class_of_checkpoint
from tl_flash.weights.files import Files, folder_tokenizer, is_of_unknown_class, is_on_hub, read_json, require_tokenizer
from tl_flash.weights.formats.dequantised import QuantisedShards, tensors_of
from tl_flash.weights.formats.gguf import Header
from tl_flash.weights.gguf_files import files_of
from tl_flash.weights.llama_cpp import gguf_tokenizer

if TYPE_CHECKING:
    import torch

SURFACES = ("bridge", "hooked")


def load_model(
    source: str | Path,
    *,
    surface: str | None = "bridge",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Any:
    """Load a model through TransformerLens.

    Args:
        source: a name on the Hugging Face hub, a folder with config.json, safetensors and a tokenizer, or a .gguf file,
            as `flash_decode` takes it. What is quantised is dequantised: GGUF by transformers, safetensors as
            `flash_decode` reads them.
        surface: "bridge" (TransformerBridge, since TransformerLens 3) or "hooked" (HookedTransformer, up to 3.9), or
            None for the bridge where the installed TransformerLens has it, else the other.
        device: where to; the CPU by default.
        dtype: of the weights, also by its name, such as "bfloat16"; float32 by default.

    Returns:
        A TransformerBridge or a HookedTransformer.

    Raises:
        TypeError: neither text nor a path, or a device or dtype that is none.
        FileNotFoundError: `source` is a folder without config.json, or neither a folder nor a name the hub could have.
        ValueError: an unknown surface, device or dtype, a file of another kind, several .gguf files or a split one, an
            unknown quantisation, a folder whose config or tokenizer is broken, or one that HookedTransformer cannot
            take.
        ImportError: a surface that the installed TransformerLens does not have.

    Example:
        >>> from tl_flash import demo, load_model
        >>> load_model(demo.path("base"), surface=None).cfg.n_layers
        4
    """
    if surface is None:
        surface = "bridge" if find_spec("transformer_lens.model_bridge") else "hooked"
    if surface not in SURFACES:
        raise ValueError(f"surface: expected one of {', '.join(map(repr, SURFACES))}, got {surface!r}")
    options = {
        "device": str(device_of(device) or "cpu"),
        "dtype": dtype_of("float32" if dtype is None else dtype),
    }
    files = files_of(source)
    local, path, name = not isinstance(files, tuple) and not is_on_hub(source), Path(source), str(source)
    if isinstance(files, tuple):
        return _from_gguf(files, surface, options)
    if local:
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name}: no config.json; expected a Hugging Face model folder")
        read_json(path / "config.json")
        require_tokenizer(path)
    if files.find("config.json") is not None:
        shards = tensors_of(files)
        if isinstance(shards, QuantisedShards):
            return _from_quantised(files, shards, surface, options)
    if surface == "bridge":
        return _bridge_class().boot_transformers(name, **options)
    return _hooked_folder(path, options) if local else _hooked_transformer().from_pretrained(name, **options)


def _from_gguf(files: Sequence[Path], surface: str, options: dict[str, Any]) -> Any:
    """A model that transformers dequantises, as plain as one that was never quantised."""
    from transformers import AutoModelForCausalLM

    path, *others = files
    if others:
        raise ValueError(
            f"{path}: one of {len(files)} parts, which transformers does not read; join them: "
            f"llama-gguf-split --merge {path.name} whole.gguf"
        )
    Header.of(path)
    tokenizer = gguf_tokenizer(path)
    try:
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=options["dtype"])
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{path}: transformers does not load it ({error}); load the unquantised model") from error
    read.config.architectures = [type(read).__name__]
    model = type(read)._from_config(read.config, dtype=options["dtype"], attn_implementation="eager")
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    return _surfaced(model, str(path), tokenizer, surface, options)


def _from_quantised(files: Files, shards: QuantisedShards, surface: str, options: dict[str, Any]) -> Any:
    """A model of safetensors that are dequantised one after the other, as plain as one that was never quantised."""
    model_class, config = class_of_checkpoint(files)
    tokenizer, dtype = files.tokenizer(), options["dtype"]
    model, about = model_class.from_pretrained(
        None,
        config=config,
        state_dict=shards.opened().in_memory(dtype),
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
    )
    missing = sorted(about["missing_keys"])
    if missing:
        raise ValueError(f"{files.checkpoint}: no tensor {missing[0]}; expected a whole {model_class.__name__}")
    return _surfaced(model, str(files.checkpoint), tokenizer, surface, options)


def _surfaced(model: Any, name: str, tokenizer: Any, surface: str, options: dict[str, Any]) -> Any:
    """A model that was dequantised, on a surface."""
    model = model.to(options["device"]).eval()
    if surface == "bridge":
        return _bridge_class().boot_transformers(name, hf_model=model, tokenizer=tokenizer, **options)
    with TemporaryDirectory() as folder:  # HookedTransformer reads a folder alone
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return _hooked_folder(Path(folder), options)


def _bridge_class() -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ImportError(
            'TransformerLens 2 has no TransformerBridge; pass surface="hooked" (--surface hooked), or install '
            "transformer-lens>=3"
        ) from error
    return TransformerBridge


def _hooked_transformer() -> Any:
    try:
        from transformer_lens import HookedTransformer
    except ImportError as error:
        raise ImportError(
            'HookedTransformer is gone from TransformerLens 4; load a bridge (surface="bridge"), or install '
            "transformer-lens<4"
        ) from error
    return HookedTransformer


def _hooked_folder(path: Path, options: dict[str, Any]) -> Any:
    """HookedTransformer.from_pretrained takes no folder; its parts do, if the name does not mislead them."""
    from transformer_lens import loading_from_pretrained as loading

    hooked = _hooked_transformer()
    name = str(path)
    if any(family in name.lower() for family in ("llama", "gemma")):
        raise ValueError(
            f"{name}: HookedTransformer takes a folder for a hub name where its path holds 'llama' or 'gemma'; "
            "load a bridge, or rename the folder"
        )
    cfg = loading.get_pretrained_model_config(name, fold_ln=True, **options)
    state = loading.get_pretrained_state_dict(name, cfg, hf_model=None)
    tokenizer = folder_tokenizer(path, add_bos_token=True) if is_of_unknown_class(path) else None  # None: its own way
    model = hooked(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(state, fold_ln=True, center_unembed=cfg.output_logits_soft_cap <= 0)
    return model
