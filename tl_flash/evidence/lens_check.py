"""How well the readings of what neurons write predict what clamping them does, with and without a lens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.clamps import Mode, Prompts, activation_stats
from tl_flash.evidence.doses import require_doses
from tl_flash.evidence.effects import Vocabulary, effects
from tl_flash.lens import JacobianLens
from tl_flash.names import Neuron
from tl_flash.progress import track
from tl_flash.weights import MLPWeights, chosen_layers, read

if TYPE_CHECKING:
    import pandas as pd


def check_lens(
    model: Any,
    lens: JacobianLens | Mapping[str, JacobianLens],
    prompts: Sequence[str] | Tensor | Sequence[Tensor],
    *,
    n: int = 60,
    doses: Sequence[float] = (1.0, 5.0, 20.0),
    layers: Sequence[int] | None = None,
    chat: bool = False,
    mode: Mode = "set",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Clamp random neurons and correlate the change of the log-probabilities with what their weights foretell.

    Each of `n` neurons a layer is clamped alone, at every position but the first, to some of its standard deviations
    over the prompts. Its effect is the change of all log-probabilities at positions from 8 on (of shorter prompts, at
    the last), in the mean over them and over the prompts; its readings are W_out @ W_U' and the same through the lens.
    A final softcap is left out of both.

    Effects differ from prompt to prompt, so no reading of weights alone reaches a correlation of 1: `ceiling` is what
    could be reached, from how well the effects on one half of the prompts agree with those on the other.

    Args:
        model: the one that the lens was made of: a HookedTransformer or a TransformerBridge.
        lens: whose layers are checked; several, by names, are checked on the same effects.
        prompts: strings or token ids [prompt, position] that the lens was not made from, of two tokens at least.
        n: how many neurons a layer.
        doses: what to clamp hook_post to, in standard deviations of the neuron's own over the prompts.
        layers: which of the lens's; all by default.
        chat: each text is what a user says, in the tokenizer's chat template.
        mode: "set" as a user clamps; "add" moves hook_post from where it was, so that small doses have small effects,
            where an exact lens is exact but for the mean over prompts.
        seed: of the draw of neurons.
        batch_size: rows a forward pass, a row being a prompt under one clamp.
        progress: a bar; by default on a terminal or in a notebook.

    Returns:
        A pandas frame, a row a layer, dose and reading ("plain", and "lens" or the names given), with columns `layer`,
        `dose`, `reading`, `correlation` (over the vocabulary, mean over neurons), `correlation_stderr` (its standard
        error over neurons), `top_raised` (share of neurons whose top token is among the ten raised most), `ceiling`
        (mean over neurons; NaN of one prompt) and `share` (correlation over ceiling). Neurons drawn that never change
        on the prompts are left out, and named in the frame's `attrs["silent"]`.

    Raises:
        TypeError: no such model, no lens, or prompts of another kind.
        ValueError: a lens of another model, layers that it does not hold, no prompts or too short ones, no doses, doses
            that are not above 0, more neurons than a layer has, or none drawn in a layer that changes on the prompts.

    Example:
        >>> lens = jacobian_lens(model, ["One day,", "The cat"])
        >>> check_lens(model, lens, ["I think that"], n=2, doses=[5.0]).columns[0]
        'layer'
    """
    import pandas as pd

    lenses = dict(lens) if isinstance(lens, Mapping) else {"lens": lens}
    if mode not in ("set", "add"):
        raise ValueError(f'mode: expected "set" or "add", got {mode!r}')
    weights = read(model)
    chosen = _layers(lenses, weights, layers)
    if not 1 <= n <= weights.d_mlp:
        raise ValueError(f"n: expected 1 to {weights.d_mlp}, the neurons of a layer, got {n}")
    require_doses(doses)
    texts = Prompts.of(model, prompts, chat=chat)
    if min(map(len, texts.rows)) < 2:
        raise ValueError("prompts: expected at least two tokens each, since the first is left alone; got one of one")
    stats = activation_stats(model, [row[None] for row in texts.rows], layers=chosen)
    vocabulary = Vocabulary.of(weights)
    generator = torch.Generator().manual_seed(seed)
    frames, silent = [], []
    for layer in chosen:
        drawn = torch.randperm(weights.d_mlp, generator=generator)[:n]
        silent += [Neuron(layer, index) for index in drawn.tolist() if stats[layer, index].std == 0]
        drawn = torch.tensor([index for index in drawn.tolist() if stats[layer, index].std > 0])
        if len(drawn) == 0:
            raise ValueError(
                f"prompts: hook_post of no neuron drawn in layer {layer} ever changes on them, so there is no standard "
                "deviation to clamp to; give more or longer prompts"
            )
        clamps = [(Neuron(layer, index), dose * stats[layer, index].std) for index in drawn.tolist() for dose in doses]
        each = effects(model, texts, clamps, mode=mode, batch_size=batch_size)
        measured = torch.stack(list(track(each, f"layer {layer}", progress, total=len(clamps))))
        readings = _readings(weights, lenses, layer, drawn)
        frames.append(_compared(vocabulary, measured, readings, doses).assign(layer=layer))
    groups = pd.concat(frames).groupby(["layer", "dose", "reading"], as_index=False, sort=False)
    means = groups.agg(
        correlation=("correlation", "mean"),
        correlation_stderr=("correlation", "sem"),
        top_raised=("top_raised", "mean"),
        ceiling=("ceiling", "mean"),
    )
    checked = means.assign(share=means["correlation"] / means["ceiling"])
    checked.attrs["silent"] = tuple(map(str, silent))
    return checked


def _layers(lenses: Mapping[str, JacobianLens], weights: MLPWeights, layers: Sequence[int] | None) -> list[int]:
    """The layers to check, all held by every lens."""
    if not lenses:
        raise ValueError("lens: expected at least one, got none")
    for lens in lenses.values():
        if not isinstance(lens, JacobianLens):
            raise TypeError(f"lens: expected a JacobianLens, got {type(lens).__name__}; make one with jacobian_lens")
        lens.require_model(weights)
    if "plain" in lenses:
        raise ValueError('lens: "plain" is the reading without a lens; give yours another name')
    chosen = chosen_layers(next(iter(lenses.values())).layers if layers is None else layers, weights.n_layers)
    for lens in lenses.values():
        for layer in chosen:
            lens.at(layer)
    return chosen


def _readings(
    weights: MLPWeights, lenses: Mapping[str, JacobianLens], layer: int, neurons: Tensor
) -> dict[str, Float[Tensor, "neuron d_model"]]:
    """Write directions as W_U' reads them, plain and through each lens."""
    x = weights.directions(layer, "out")[neurons.to(weights.W_U.device)]
    return {"plain": x, **{name: lens.carry(x, layer) for name, lens in lenses.items()}}


def _compared(
    vocabulary: Vocabulary,
    measured: Float[Tensor, "clamp text d_model"],
    readings: dict[str, Float[Tensor, "neuron d_model"]],
    doses: Sequence[float],
) -> pd.DataFrame:
    """A row a clamp and reading."""
    import pandas as pd

    mean, ceiling = measured.mean(1), vocabulary.ceiling(measured)
    raised = vocabulary.top(mean, 10)
    rows = []
    for name, vectors in readings.items():
        repeated = vectors.repeat_interleave(len(doses), dim=0)  # as the clamps: all doses of a neuron together
        top = vocabulary.top(vectors, 1).repeat_interleave(len(doses), dim=0)
        columns = {
            "dose": list(doses) * len(vectors),
            "reading": name,
            "correlation": vocabulary.correlation(repeated, mean).tolist(),
            "top_raised": (raised == top).any(1).double().tolist(),
            "ceiling": ceiling.tolist(),
        }
        rows.append(pd.DataFrame(columns))
    return pd.concat(rows)
