"""What one forward pass shows of each block, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_flash.clamps import attached, hook_point, run_to
from tl_flash.weights import differentiating

NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
PRE_ACTIVATIONS = ("hook_pre", "hook_pre_linear")


class Call(NamedTuple):
    """What a module was given, and what it answered."""

    given: tuple[Tensor, ...]
    answer: Tensor


@dataclass
class Passage:
    """What passed through one block, batch first; what it does not have, or does not show, is missing."""

    lengths: tuple[int, ...]
    """Of the texts; what stands at later positions is padding, which no earlier one sees."""
    entered: Float[Tensor, "text position d_model"]
    """The residual stream before the block, cut off from what came before it."""
    delta: Float[Tensor, "text 1 d_model"] | None = None
    """What was added to it at every position but the first: zero, with a gradient; None where none was asked for."""
    pattern: Float[Tensor, "text head query key"] | None = None
    """Of attention; a constant to gradients."""
    calls: dict[str, Call] = field(default_factory=dict)
    """Of the attention, the MLP and the norms, by their names in the block."""
    pre: list[Float[Tensor, "text position d_mlp"]] = field(default_factory=list)
    """Pre-activations as leaves of a graph that ends at `post`: of the gate, then up, or of an ungated MLP's one."""
    post: Float[Tensor, "text position d_mlp"] | None = None
    left: Float[Tensor, "text position d_model"] | None = None
    """The residual stream after the block."""

    def counted(self, first: Sequence[int]) -> Float[Tensor, "text position"]:
        """1 at each text's positions from its `first` on, 0 elsewhere."""
        positions = torch.arange(self.entered.shape[1], device=self.entered.device)
        bounds = torch.tensor([[*first], [*self.lengths]], device=self.entered.device)[..., None]
        counted = (positions >= bounds[0]) & (positions < bounds[1])
        return counted.to(torch.promote_types(self.entered.dtype, torch.float32))


def passages(
    model: Any,
    texts: Sequence[Int[Tensor, " position"]],
    take: Callable[[int, Passage], None],
    *,
    moved: frozenset[int] = frozenset(),
) -> None:
    """Run a model once and hand over what passed through each block, as it leaves it; only one is held at a time.

    Texts of different lengths are padded on the right, by their own last token: attention is causal, so that no text
    sees it.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        texts: token ids of each.
        take: gets the layer and its passage.
        moved: layers whose passage has a `delta`, and a graph from it to `left`.

    Raises:
        RuntimeError: a block did not pass through hook_resid_pre and hook_resid_post.
    """
    seen: set[int] = set()
    last, lengths = len(model.blocks) - 1, tuple(map(len, texts))

    def given(layer: int, passage: Passage) -> None:
        seen.add(layer)
        take(layer, passage)

    with ExitStack() as stack, differentiating(model):
        for layer, block in enumerate(model.blocks):
            stack.enter_context(_watched(model, block, layer, lengths, given, layer in moved))
        run_to(model, padded(texts), last)
    missing = set(range(len(model.blocks))) - seen
    if missing:
        raise RuntimeError(f"layers {sorted(missing)}: the model did not pass through their hook_resid_post")


def padded(texts: Sequence[Int[Tensor, " position"]]) -> Int[Tensor, "text position"]:
    """Texts of different lengths, padded on the right by their own last token."""
    longest = max(map(len, texts))
    return torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in texts])


@contextmanager
def _watched(
    model: Any, block: Any, layer: int, lengths: tuple[int, ...], take: Callable[[int, Passage], None], moved: bool
) -> Iterator[None]:
    """Hooks on one block that fill a passage and hand it over."""
    current: list[Passage] = []
    gated = torch.is_tensor(getattr(getattr(block, "mlp", None), "W_gate", None))

    def enter(residual: Tensor, hook: Any) -> Tensor:
        passage = Passage(lengths, residual.detach())
        current[:] = [passage]
        if not moved:
            return passage.entered
        passage.delta = residual.new_zeros(len(residual), 1, residual.shape[-1]).requires_grad_()
        moves = torch.ones(residual.shape[1], 1, dtype=residual.dtype, device=residual.device)
        moves[0] = 0
        return passage.entered + passage.delta * moves

    def keep_pattern(pattern: Tensor, hook: Any) -> Tensor:
        current[0].pattern = pattern.detach()
        return current[0].pattern

    def keep_pre(pre: Tensor, hook: Any) -> Tensor | None:
        if moved:
            return None
        leaf = pre.detach().requires_grad_()
        current[0].pre.append(leaf)
        return leaf * 1  # an activation in place may not write to a leaf

    def keep_post(post: Tensor, hook: Any) -> Tensor | None:
        if moved:
            return None
        current[0].post = post
        return post.detach()

    def leave(residual: Tensor, hook: Any) -> None:
        passage = current.pop()
        passage.left = residual
        take(layer, passage)

    def called(name: str) -> Callable[..., None]:
        def keep(module: Any, args: tuple, kwargs: dict[str, Any], answer: Any) -> None:
            given = tuple(each.detach() for each in (*args, *kwargs.values()) if torch.is_tensor(each))
            output = answer[0] if isinstance(answer, tuple) else answer
            if current and torch.is_tensor(output):
                current[0].calls[name] = Call(given, output.detach())

        return keep

    points = {"hook_resid_pre": enter, "attn.hook_pattern": keep_pattern, "mlp.hook_post": keep_post}
    points |= {f"mlp.{name}": keep_pre for name in PRE_ACTIVATIONS[: 1 + gated]}
    dense = torch.is_tensor(getattr(getattr(block, "mlp", None), "W_in", None))
    names = {name: function for name, function in points.items() if dense or not name.startswith("mlp.")}
    hooks = [(f"blocks.{layer}.{name}", function) for name, function in names.items()]
    hooks = [pair for pair in hooks if has_hook(model, pair[0])] + [(f"blocks.{layer}.hook_resid_post", leave)]
    with ExitStack() as stack:
        stack.enter_context(attached(model, hooks))
        for name in ("attn", "mlp", *NORMS):
            module = getattr(block, name, None)
            if isinstance(module, torch.nn.Module):
                handle = module.register_forward_hook(called(name), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def has_hook(model: Any, name: str) -> bool:
    """Whether a model has a hook point of this name."""
    try:
        hook_point(model, name)
    except ValueError:
        return False
    return True
