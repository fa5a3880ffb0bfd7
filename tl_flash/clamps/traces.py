"""What one neuron does at every token of a text."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_flash.clamps.prompts import Prompts
from tl_flash.clamps.sites import attached, neuron_site, run_to
from tl_flash.names import Neuron, NeuronLike
from tl_flash.weights import measuring


def activations_on(model: Any, prompts: Prompts, neuron: NeuronLike) -> list[Float[Tensor, " position"]]:
    """One neuron's hook_post at every position of each prompt, a beginning-of-sequence token included.

    Args:
        model: a HookedTransformer or a TransformerBridge, run with whatever hooks it has.
        prompts: the texts.
        neuron: which one, of a dense MLP.

    Raises:
        ValueError: a layer or neuron that does not exist, or a layer without a dense MLP.

    Example:
        >>> from tl_flash.clamps import Prompts, activations_on
        >>> prompts = Prompts.of(model, ["the dog saw a cat"])
        >>> [len(row) for row in activations_on(model, prompts, "L1N3")] == [len(prompts.rows[0])]
        True
    """
    layer, index = Neuron.of(neuron)
    site = neuron_site(model, layer, "post")
    if site.d_mlp is not None and index >= site.d_mlp:
        raise ValueError(f"neuron {neuron}: layer {layer} has neurons 0 to {site.d_mlp - 1}")
    found: list[Tensor] = []

    def see(act: Tensor, hook: Any) -> Tensor:
        found.append(act[0, :, index].detach().float().cpu())
        return act

    with measuring(model), attached(model, [(site.name, see)]):
        for row in prompts.rows:
            run_to(model, row[None], layer)
    return found
