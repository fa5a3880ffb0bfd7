"""Load a model by name or folder for the command line and the demo; a library user loads it himself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SURFACES = ("bridge", "hooked")


def load_model(name: str, surface: str = "bridge") -> Any:
    """Load a model through TransformerLens, float32, on the CPU.

    Args:
        name: a Hugging Face name, or a folder with config.json, safetensors and a tokenizer.
        surface: "bridge" (TransformerBridge) or "hooked" (HookedTransformer, up to TransformerLens 3.9).

    Raises:
        FileNotFoundError: `name` looks like a folder, but holds no config.json.
        ValueError: an unknown surface, a file, or a folder that HookedTransformer cannot take.
        ImportError: HookedTransformer asked of TransformerLens 4.
    """
    if surface not in SURFACES:
        raise ValueError(f"surface: expected one of {', '.join(map(repr, SURFACES))}, got {surface!r}")
    path = Path(name)
    local = path.is_dir()
    if path.is_file():
        raise ValueError(f"{name}: a file; expected a model's folder, give {path.parent}")
    if local and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{name}: expected a model folder with config.json")
    if not local and (path.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(f"{name}: no such folder")
    if surface == "bridge":
        return _bridge(name)
    return _hooked_folder(path) if local else _hooked_transformer().from_pretrained(name, device="cpu")


def _bridge(name: str) -> Any:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, device="cpu", dtype=torch.float32)


def _hooked_transformer() -> Any:
    try:
        from transformer_lens import HookedTransformer
    except ImportError as error:
        raise ImportError(
            "HookedTransformer is gone from TransformerLens 4; load a bridge, or install transformer-lens<4"
        ) from error
    return HookedTransformer


def _hooked_folder(path: Path) -> Any:
    """HookedTransformer.from_pretrained takes no folder; its parts do, if the name does not mislead them."""
    import torch
    from transformer_lens import loading_from_pretrained as loading

    hooked = _hooked_transformer()
    name = str(path)
    if any(family in name.lower() for family in ("llama", "gemma")):
        raise ValueError(
            f"{name}: HookedTransformer takes a folder for a hub name where its path holds 'llama' or 'gemma'; "
            "load a bridge, or rename the folder"
        )
    cfg = loading.get_pretrained_model_config(name, fold_ln=True, device="cpu", dtype=torch.float32)
    state = loading.get_pretrained_state_dict(name, cfg, hf_model=None)
    model = hooked(cfg, tokenizer=None, move_to_device=False)
    model.load_and_process_state_dict(state, fold_ln=True, center_unembed=cfg.output_logits_soft_cap <= 0)
    return model
