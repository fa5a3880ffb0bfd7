"""Hold many neurons in a pass, in each row of a batch others and at positions of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_flash.clamps.sites import Hook, attached, neuron_site, refuse_block_hook


@contextmanager
def clamp_spots(
    model: Any, where: Bool[Tensor, "row layer position neuron"], values: Float[Tensor, "layer neuron"]
) -> Iterator[Any]:
    """Set hook_post to each neuron's value wherever `where` says, in passes of that many rows and positions.

    Args:
        model: a HookedTransformer or a TransformerBridge, of dense MLPs of one width.
        where: what is held, in each row of the batch.
        values: what at.

    Yields:
        The model.

    Raises:
        TypeError: the model has no TransformerLens hooks.
        ValueError: a layer without a dense MLP, or of another width; a pass of another number of rows or positions.

    Example:
        >>> from tl_flash.clamps import clamp_spots
        >>> tokens = model.to_tokens("the dog saw a cat")
        >>> where = torch.zeros(1, model.cfg.n_layers, tokens.shape[1], model.cfg.d_mlp, dtype=torch.bool)
        >>> where[0, 1, 2:4, [5, 7]] = True
        >>> with clamp_spots(model, where, torch.zeros(model.cfg.n_layers, model.cfg.d_mlp)):
        ...     logits = model(tokens)
    """

    def hold(layer: int) -> Hook:
        def held(act: Tensor, hook: Any) -> Tensor:
            refuse_block_hook(hook.name)
            spots = where[:, layer]
            if act.shape != spots.shape:
                raise ValueError(
                    f"where: expected [row, layer, position, neuron] to fit passes of {list(act.shape)}, got "
                    f"{list(where.shape)}"
                )
            return torch.where(spots.to(act.device), values[layer].to(act), act)

        return held

    layers = where.any(dim=(0, 2, 3)).nonzero()[:, 0].tolist()
    with attached(model, [(neuron_site(model, layer, "post").name, hold(layer)) for layer in layers]):
        yield model
