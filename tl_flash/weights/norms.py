"""Norms told by what they do: what one multiplies by, and which stands before a Hugging Face model's unembedding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_flash.weights.calls import first_tensor, same
from tl_flash.weights.probes import unit
from tl_flash.weights.running import measuring
from tl_flash.weights.tiny import token_ids

_FEW = 1000
"""Of the logits, those nearest 0, which no softcap bends."""
_NEAR = 1e-2
"""How far a factor may be off in a model of half precision."""


def traced_final_norm(model: Any, head: nn.Module) -> tuple[Float[Tensor, " d_model"], bool]:
    """The scale of the norm whose output the unembedding reads, and whether it centres.

    The norm is the module that gave what the unembedding was given; and it has to read what the last block wrote, or
    what the unembedding reads is not the residual stream (a masked language model's head has a dense layer between).

    Raises:
        ValueError: no such norm, or the logits are something else than the unembedding's answer.
    """
    seen: list[tuple[nn.Module, Any, Any]] = []

    def see(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.append((module, inputs, output))

    hooks = [module.register_forward_hook(see) for module in model.modules()]
    try:
        with measuring(model):
            logits = model(token_ids().to(head.weight.device)).logits  # pyright: ignore[reportArgumentType]
    finally:
        for hook in hooks:
            hook.remove()
    read, answer = next((inputs[0], output) for module, inputs, output in seen if module is head)
    if not abs(logit_factor(logits, answer) - 1) < _NEAR:
        raise ValueError(
            f"model: {type(model).__name__}'s logits are not what its unembedding answers; expected them as they are. "
            "Give the unembedding itself, [d_model, d_vocab], in place of the model"
        )
    blocks = {block for group in model.modules() if isinstance(group, nn.ModuleList) for block in group}
    for module, inputs, output in seen:
        if inputs and torch.is_tensor(output) and same(output, read):
            from_block = any(of in blocks and _is(written, inputs[0]) for of, _, written in seen)
            found = _norm(module, inputs[0]) if from_block else None
            if found is not None:
                return found
    raise ValueError(
        f"model: no norm found between the last block and the unembedding of {type(model).__name__}; expected the "
        "unembedding to read the residual stream through one. Give the unembedding itself, [d_model, d_vocab], in "
        "place of the model"
    )


def logit_factor(logits: Tensor, answer: Tensor) -> float:
    """What a model multiplies its unembedding's answer by, told where that is near 0; NaN where the two do not fit."""
    if logits.numel() != answer.numel():
        return float("nan")
    logits, answer = logits.detach().flatten().double(), answer.detach().flatten().double()
    logits, answer = logits[answer != 0], answer[answer != 0]
    nearest = answer.abs().argsort()[:_FEW]
    return float((logits[nearest] / answer[nearest]).median())


def nearer_factor(seen: float, *factors: float) -> float:
    """The one of these factors that was seen, but for rounding.

    Raises:
        ValueError: none of them was.
    """
    nearest = min(factors, key=lambda factor: abs(seen - factor))
    if not abs(seen - nearest) <= _NEAR * abs(nearest):
        raise ValueError(
            f"model: it multiplies its unembedding's answer by {seen:.4g}; expected "
            f"{' or '.join(f'{factor:.4g}' for factor in factors)}, as models of its class and config do"
        )
    return nearest


def _is(output: Any, tensor: Any) -> bool:
    written = first_tensor(output)
    return written is not None and torch.is_tensor(tensor) and same(written, tensor)


def _norm(module: nn.Module, like: Tensor) -> tuple[Tensor, bool] | None:
    """The scale of a norm and whether it centres, by its answers to v, -v and v + 1; None where it is no norm."""
    d_model = like.shape[-1]
    v = 64 * torch.randn(2, 1, d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(like)
    with measuring(module):
        odd = ((module(v) - module(-v)) / 2).double()[:, 0]  # no bias
        shifted = ((module(v + 64) - module(-v - 64)) / 2).double()[:, 0]
    tolerance = 1e-3 if like.dtype in (torch.float32, torch.float64) else 3e-2
    centre = bool((odd - shifted).norm() <= tolerance * odd.norm())
    u = unit(v.double()[:, 0], centre)
    gain = (odd * u).sum(0) / u.square().sum(0)
    is_norm = bool((odd - gain * u).norm() <= tolerance * odd.norm())
    return (gain.float(), centre) if is_norm else None


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
