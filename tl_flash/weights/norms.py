"""Norms told by what they do: what one multiplies by, and which stands before a Hugging Face model's unembedding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_flash.weights.calls import unit
from tl_flash.weights.running import measuring

_TOKENS = torch.tensor([[3, 1, 2]])


def traced_final_norm(model: Any, head: nn.Module) -> tuple[Float[Tensor, " d_model"], bool]:
    """The scale of the norm whose output the unembedding reads, and whether it centres.

    The norm is the module that gave what the unembedding was given; and it has to read what the last block wrote, or
    what the unembedding reads is not the residual stream (a masked language model's head has a dense layer between).

    Raises:
        ValueError: no such norm.
    """
    seen: list[tuple[nn.Module, Any, Any]] = []

    def see(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.append((module, inputs, output))

    hooks = [module.register_forward_hook(see) for module in model.modules()]
    try:
        with measuring(model):
            model(_TOKENS.to(head.weight.device))  # pyright: ignore[reportCallIssue, reportArgumentType]
    finally:
        for hook in hooks:
            hook.remove()
    read = next(inputs[0] for module, inputs, _ in seen if module is head)
    blocks = {block for group in model.modules() if isinstance(group, nn.ModuleList) for block in group}
    for module, inputs, output in seen:
        if inputs and torch.is_tensor(output) and _same(output, read):
            from_block = any(of in blocks and _same(_first(written), inputs[0]) for of, _, written in seen)
            found = _norm(module, inputs[0]) if from_block else None
            if found is not None:
                return found
    raise ValueError(
        f"model: no norm found between the last block and the unembedding of {type(model).__name__}; expected the "
        "unembedding to read the residual stream through one. Give the unembedding itself, [d_model, d_vocab], in "
        "place of the model"
    )


def _norm(module: nn.Module, like: Tensor) -> tuple[Tensor, bool] | None:
    """The scale of a norm and whether it centres, by its answers to v, -v and v + 1; None where it is no norm."""
    d_model = like.shape[-1]
    v = 64 * torch.randn(2, 1, d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(like)
    with measuring(module):
        odd = ((module(v) - module(-v)) / 2).double()[:, 0]  # no bias
        shifted = ((module(v + 64) - module(-v - 64)) / 2).double()[:, 0]
    tolerance = 1e-3 if like.dtype in (torch.float32, torch.float64) else 3e-2
    centre = bool((odd - shifted).norm() <= tolerance * odd.norm())
    unit = v.double()[:, 0] - (v.double()[:, 0].mean(-1, keepdim=True) if centre else 0)
    unit = unit / unit.square().mean(-1, keepdim=True).sqrt()
    gain = (odd * unit).sum(0) / unit.square().sum(0)
    is_norm = bool((odd - gain * unit).norm() <= tolerance * odd.norm())
    return (gain.float(), centre) if is_norm else None


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _same(a: Any, b: Any) -> bool:
    return torch.is_tensor(a) and torch.is_tensor(b) and a.shape == b.shape and torch.equal(a, b)


@torch.no_grad()
def probed_gain(norm: Any, like: Tensor, centre: bool) -> Tensor | None:
    """What a norm multiplies each coordinate by, float32, from its answers to v and -v; None where that is 1.

    On as many 1024s as -1024s most norms are exact: the mean is 0, the mean square 2^20, and eps is lost beside it.
    Where the answer is the norm's own weight, or 1 more, but for rounding, it is taken from there.
    """
    d_model = like.shape[0]
    v = torch.full((d_model,), 1024.0, dtype=torch.float32, device=like.device)
    v[torch.randperm(d_model, generator=torch.Generator().manual_seed(0))[: d_model // 2]] *= -1
    given = v.to(like.dtype)[None, None]
    answers = norm(given) - norm(-given)
    if torch.equal(norm(2 * given), 2 * norm(given)):
        return None  # it does not normalise: a place where other models have a norm
    gain = answers.flatten().float() / 2 / unit(v, centre)
    close = 1e-5 if like.dtype in (torch.float32, torch.float64) else 2e-2
    weight = getattr(norm, "w", None)
    exact = [weight.detach().float() + offset for offset in (0, 1)] if torch.is_tensor(weight) else []
    gain = next((one for one in exact if torch.allclose(one, gain, rtol=close, atol=close)), gain)
    return None if bool((gain - 1).abs().max() < 1e-6) else gain
