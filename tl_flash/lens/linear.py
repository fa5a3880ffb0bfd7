"""A model whose backward pass is that of a linear map, so that what is attributed to its parts adds up (LRP).

What normalises and what attends is held constant, and a product or an activation function is shared out by its secant:
the rules that "RelP" (arXiv 2508.21258) takes from layer-wise relevance propagation (AttnLRP, arXiv 2402.05602).
Forward passes stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_flash.clamps import Prompts, attached
from tl_flash.lens.mean_field import survey
from tl_flash.lens.norms import Norm
from tl_flash.lens.passages import NORMS, PRE_ACTIVATIONS

Rule = Literal["gradient", "frozen", "relp"]
_NEAR_ZERO = 1e-6
"""Of a gate's largest pre-activation: nearer zero the secant is the slope."""


def require_rule(rule: str) -> None:
    """Refuse a rule that does not exist."""
    if rule not in get_args(Rule):
        raise ValueError(f"rule: expected one of {', '.join(map(repr, get_args(Rule)))}, got {rule!r}")


@contextmanager
def linearised(model: Any, tokens: Int[Tensor, " position"], rule: Rule) -> Iterator[None]:
    """Change what gradients flow through inside the context, and no output.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: what will be run; it is run once before, to see of what each block is made.
        rule: "gradient" changes nothing. "frozen" holds the norms' scales and the attention patterns constant. "relp"
            also takes an activation function for the line from zero through its value, and gives half of a product of
            gate and up to each of them; the model is then linear in the residual stream, but for
            biases and a softcap on the logits.

    Raises:
        ValueError: an unknown rule, or a model of which these parts cannot be told.

    Example:
        >>> from tl_flash.lens import linearised
        >>> tokens = model.to_tokens("the dog saw a cat")
        >>> with linearised(model, tokens[0], "relp"):
        ...     logits = model(tokens)
    """
    require_rule(rule)
    if rule == "gradient":
        yield
        return
    with ExitStack() as stack:
        for module in _norms(model, tokens, rule):
            held = partial(_frozen, norm=Norm.probe(module, model.W_U[:, 0]))
            stack.callback(module.register_forward_hook(held, with_kwargs=True).remove)
        layers = range(len(model.blocks))
        hooks = [(f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: pattern.detach()) for layer in layers]
        if rule == "relp":
            hooks += [pair for layer in layers for pair in _shared_out(model.blocks[layer].mlp, layer)]
        stack.enter_context(attached(model, hooks))
        yield


def _norms(model: Any, tokens: Int[Tensor, " position"], rule: Rule) -> list[torch.nn.Module]:
    """The norms on the residual stream, of a model in which the rules hold for all else."""
    closed = survey(model, Prompts((tokens.cpu(),)))
    opaque = [layer for layer, block in enumerate(closed) if block is None]
    if opaque:
        raise ValueError(
            f"rule={rule!r}: layer {opaque[0]} is not made of norms, attention by a pattern and an MLP of single "
            f"neurons alone (of {len(closed)} layers {len(opaque)} are not), so nothing says what to hold constant "
            'in it; use rule="gradient"'
        )
    found = [getattr(block, name, None) for block in model.blocks for name in NORMS]
    found.append(getattr(model, "ln_final", None))
    return [norm for norm in found if isinstance(norm, torch.nn.Module)]


def _frozen(module: Any, args: tuple, kwargs: dict[str, Any], answer: Tensor, *, norm: Norm) -> Tensor:
    """A norm's answer, with the gradient of one whose scale is a constant."""
    x = next(each for each in (*args, *kwargs.values()) if torch.is_tensor(each))
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.detach().to(wide)
    expected, tolerance = norm(value), 1e-3 if x.dtype == wide else 3e-2
    if not (answer.detach() - expected).norm() <= tolerance * expected.norm():
        raise ValueError(f'rule: a {type(module).__name__} is no LayerNorm and no RMSNorm; use rule="gradient"')
    change = x.to(wide) - value
    if norm.centre:
        change = change - change.mean(-1, keepdim=True)
    return answer.detach() + (change * norm.unit(value)[1][..., None] * norm.gain).to(answer.dtype)


def _shared_out(mlp: Any, layer: int) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks by which hook_post is linear in what its neurons were made of, with the same value."""
    gated = torch.is_tensor(getattr(mlp, "W_gate", None))
    given: list[tuple[Tensor, Tensor]] = []

    def keep(pre: Tensor, hook: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return pre
        leaf = pre.detach().requires_grad_()
        given.append((pre, leaf))
        return leaf * 1  # an activation in place may not write to a leaf

    def share(post: Tensor, hook: Any) -> Tensor:
        if not given:
            return post
        pres, leaves = zip(*given, strict=True)
        given.clear()
        slopes = torch.autograd.grad(post.sum(), leaves)
        values = [pre.detach() for pre in pres]
        product = slopes[-1] * values[-1] if gated else post.detach()
        lines = [_secant(product, values[0], slopes[0]), *slopes[1:]]
        parts = [line * (pre - value) for line, pre, value in zip(lines, pres, values, strict=True)]
        return post.detach() + torch.stack(parts).mean(0)

    names = PRE_ACTIVATIONS[: 1 + gated]
    return [(f"blocks.{layer}.mlp.{name}", keep) for name in names] + [(f"blocks.{layer}.mlp.hook_post", share)]


def _secant(value: Float[Tensor, "*shape"], at: Float[Tensor, "*shape"], slope: Float[Tensor, "*shape"]) -> Tensor:
    """The slope of the line from zero through the value, a limit at zero."""
    near = at.abs() <= _NEAR_ZERO * at.abs().max()
    return torch.where(near, slope, value / torch.where(near, 1, at))
