"""Where a layer's neurons pass on every surface of TransformerLens, and hooks held there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor

At = Literal["post", "up", "gate"]
Hook = Callable[..., Tensor | None]
# On a bridge, hook_pre and hook_post of a mixture of experts are other names for the block's input and output.
_BLOCK_HOOKS = ("mlp.hook_in", "mlp.hook_out", "hook_mlp_in", "hook_mlp_out")


class Site(NamedTuple):
    """A hook point that one layer's neurons pass through."""

    name: str
    d_mlp: int | None
    """None where no model was given to ask."""
    expert: int | None = None


def neuron_site(model: Any, layer: int, at: At) -> Site:
    """Find the hook point of a layer's neurons.

    Args:
        model: a HookedTransformer or a TransformerBridge; None takes hook_post on trust.
        layer: from 0.
        at: "post" (what W_out reads), "up" (what W_in wrote) or "gate" (what W_gate wrote, not yet activated).

    Raises:
        TypeError: the model has no TransformerLens hooks.
        ValueError: `at` is unknown or needs a model; the layer does not exist, holds no dense MLP or has no gate.
    """
    if at not in get_args(At):
        raise ValueError(f'at: expected "post", "up" or "gate", got {at!r}')
    if model is None:
        if at != "post":
            raise ValueError(f"at={at!r}: which hook this is depends on whether the MLP is gated; pass model=")
        return Site(f"blocks.{layer}.mlp.hook_post", None)
    mlp = _dense_mlp(model, layer)
    gated = torch.is_tensor(getattr(mlp, "W_gate", None))
    if at == "gate" and not gated:
        raise ValueError(f'at="gate": layer {layer} of this model has no gate; at="up" is its pre-activation')
    hook = {"post": "hook_post", "gate": "hook_pre", "up": "hook_pre_linear" if gated else "hook_pre"}[at]
    site = Site(f"blocks.{layer}.mlp.{hook}", mlp.W_in.shape[1])
    refuse_block_hook(hook_point(model, site.name).name)
    return site


def expert_site(model: Any, layer: int, expert: int, at: At) -> Site:
    """Find the hook point of an expert's neurons, through which the tokens pass that are routed to it.

    Args:
        model: a HookedTransformer; a bridge runs a layer's experts as one, without hooks inside.
        layer: from 0.
        expert: from 0.
        at: as in `neuron_site`.

    Raises:
        TypeError: the model has no TransformerLens hooks.
        ValueError: `at` is unknown; no model; the layer or the expert does not exist, or no hook reaches its neurons.
    """
    if at not in get_args(At):
        raise ValueError(f'at: expected "post", "up" or "gate", got {at!r}')
    if model is None:
        raise ValueError("neurons: which hooks those of experts have depends on the model; pass model=")
    mlp = _mlp(model, layer)
    experts = getattr(mlp, "experts", None)
    hook = {"post": "hook_post", "gate": "hook_gate", "up": "hook_pre"}[at]
    if not isinstance(experts, torch.nn.ModuleList) or not all(hasattr(one, hook) for one in experts):
        raise ValueError(
            f"layer {layer}: expected experts that pass their neurons through hooks of their own, as "
            f"HookedTransformer's do, found a {type(mlp).__name__} without; clamp neurons of a dense MLP"
        )
    if expert >= len(experts):
        raise ValueError(f"expert {expert}: those of layer {layer} that hooks reach are 0 to {len(experts) - 1}")
    chosen: Any = experts[expert]
    return Site(f"blocks.{layer}.mlp.experts.{expert}.{hook}", chosen.W_in.weight.shape[0], expert)


def require_hooks(model: Any) -> None:
    """Refuse what has no TransformerLens hooks that a pass goes through.

    Raises:
        TypeError: it is no HookedTransformer and no TransformerBridge; the message says how to make one of it.
        ValueError: it is compiled, or an encoder with a decoder.
    """
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ValueError("model: compiled, and what torch.compile made passes hooks by; give model._orig_mod")
    own = getattr(model, "__dict__", ())
    hooked = "hook_dict" in own or hasattr(type(model), "hook_dict")  # to ask a bridge for it builds it
    if hooked and (hasattr(model, "decoder_blocks") or hasattr(model, "encoder_blocks")):
        raise ValueError("model: expected one stack of blocks, got an encoder and a decoder; give a decoder-only model")
    if hooked and hasattr(model, "blocks"):
        return
    if isinstance(model, torch.nn.Module) and hasattr(model, "config") and hasattr(model, "get_output_embeddings"):
        raise TypeError(
            f"model: {kind} is a Hugging Face model, without TransformerLens's hooks; boot it, "
            'TransformerBridge.boot_transformers("my/model", hf_model=model, tokenizer=tokenizer), and give the bridge'
        )
    if isinstance(model, str | Path):
        raise TypeError(
            f"model: this runs the model, and {str(model)!r} is the name of a checkpoint; load it first, as "
            f"load_model({str(model)!r})"
        )
    raise TypeError(f"model: expected a HookedTransformer or a TransformerBridge, got {kind}")


def _mlp(model: Any, layer: int) -> Any:
    require_hooks(model)
    n_layers = len(model.blocks)
    if layer >= n_layers:
        raise ValueError(f"layer {layer}: this model's layers are 0 to {n_layers - 1}")
    return getattr(model.blocks[layer], "mlp", None)


def _dense_mlp(model: Any, layer: int) -> Any:
    mlp = _mlp(model, layer)
    if mlp is None or not torch.is_tensor(getattr(mlp, "W_in", None)) or mlp.W_in.ndim != 2:
        raise ValueError(
            f"layer {layer}: expected a dense MLP, found {type(mlp).__name__} without one matrix W_in (a mixture of "
            "experts?); no hook carries its neurons, so choose a layer with a dense MLP"
        )
    return mlp


def refuse_block_hook(name: str | None) -> None:
    """Refuse a hook point that carries a block's input or output where neurons were expected.

    Raises:
        ValueError: it does.
    """
    if name is not None and name.endswith(_BLOCK_HOOKS):
        raise ValueError(
            f"{name} carries the block's own input or output, not neurons (a mixture of experts?); "
            "choose a layer with a dense MLP"
        )


def hook_point(model: Any, name: str) -> Any:
    """The model's hook point of that name or alias.

    Raises:
        ValueError: it has none.
    """
    point = reduce(lambda owner, part: getattr(owner, part, None), name.split("."), model)
    if isinstance(point, torch.nn.Module) and not hasattr(point, "fwd_hooks"):
        raise ValueError(
            f"hook {name!r}: a {type(point).__name__} has taken its place (an attached SAE?); take it off first, with "
            "model.reset_saes()"
        )
    if not hasattr(point, "fwd_hooks"):
        raise ValueError(f"hook {name!r}: this {type(model).__name__} has no hook point of that name")
    return point


class _Reached(Exception):
    """What a run was for has been computed."""


def run_to(model: Any, tokens: Int[Tensor, "text position"], layer: int) -> None:
    """Run a model to the end of a layer and no further; a bridge told to stop after its last goes on to the logits."""
    tokens, name = tokens.to(model.W_U.device), f"blocks.{layer}.hook_resid_post"
    if layer < len(model.blocks) - 1 or not hasattr(model, "original_model"):
        model(tokens, return_type=None, stop_at_layer=layer + 1)
        return

    def stop(residual: Tensor, hook: Any) -> None:
        raise _Reached

    with attached(model, [(name, stop)]), suppress(_Reached):
        model(tokens, return_type=None)


@contextmanager
def attached(model: Any, hooks: Iterable[tuple[str, Hook]]) -> Iterator[None]:
    """Hold forward hooks on a model inside the context, and remove exactly these on leaving it.

    Raises:
        ValueError: the model has no hook point of a name.
        RuntimeError: on leaving, where somebody else removed one of them.
    """
    targets = [(hook_point(model, name), name, function) for name, function in hooks]
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(_one_attached(*target))
        yield


@contextmanager
def _one_attached(point: Any, name: str, function: Hook) -> Iterator[None]:
    # Permanent in TransformerLens's sense: reset_hooks() inside the context must not end it unseen.
    point.add_hook(function, is_permanent=True)
    handle = point.fwd_hooks[-1]
    try:
        yield
        if not any(other is handle for other in point.fwd_hooks):
            raise RuntimeError(
                f"the hook {function!r} on {name} was removed inside the context; later passes lacked it"
            )
    finally:
        handle.hook.remove()
        point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]
