"""How well the readings of what neurons write predict what clamping them does, with and without a lens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.clamps import Answers, Mode, Prompts, activation_stats, answers_alone
from tl_flash.lens import JacobianLens
from tl_flash.names import Neuron
from tl_flash.progress import track
from tl_flash.weights import MLPWeights, read

if TYPE_CHECKING:
    import pandas as pd


def check_lens(
    model: Any,
    lens: JacobianLens,
    prompts: Sequence[str] | Tensor,
    *,
    n: int = 60,
    doses: Sequence[float] = (1.0, 5.0, 20.0),
    mode: Mode = "set",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Clamp random neurons and correlate the change of the log-probabilities with what their weights foretell.

    Each of `n` neurons a layer is clamped alone, at every position, to some of its standard deviations over the
    prompts. Its effect is the change of all log-probabilities after the prompts, in the mean over them; its readings
    are W_out @ W_U' and the same through the lens.

    Args:
        model: the one that the lens was made of: a HookedTransformer or a TransformerBridge.
        lens: whose layers are checked.
        prompts: strings or token ids [prompt, position] that the lens was not made from.
        n: how many neurons a layer.
        doses: what to clamp hook_post to, in standard deviations of the neuron's own over the prompts.
        mode: "set" as a user clamps; "add" moves hook_post from where it was, so that small doses have small effects,
            where the lens is exact but for the mean over prompts.
        seed: of the draw of neurons.
        batch_size: rows a forward pass, a row being a prompt under one clamp.
        progress: a bar; by default on a terminal or in a notebook.

    Returns:
        A pandas frame, a row a layer, dose and reading ("plain", "lens"), with columns `layer`, `dose`, `reading`,
        `correlation` (over the vocabulary, mean over neurons), `correlation_stderr` (its standard error over neurons)
        and `top_raised` (share of neurons whose top token is among the ten raised most).

    Raises:
        TypeError: no such model, no lens, or prompts of another kind.
        ValueError: a lens of another model, no prompts or doses, doses that are not above 0, more neurons than a layer
            has, or a neuron that never changes on the prompts.

    Example:
        >>> lens = jacobian_lens(model, ["One day,", "The cat"])
        >>> check_lens(model, lens, ["I think that"], n=2, doses=[5.0]).columns[0]
        'layer'
    """
    import pandas as pd

    if not isinstance(lens, JacobianLens):
        raise TypeError(f"lens: expected a JacobianLens, got {type(lens).__name__}; make one with jacobian_lens")
    if mode not in ("set", "add"):
        raise ValueError(f'mode: expected "set" or "add", got {mode!r}')
    weights = read(model)
    lens.require_model(weights)
    if not 1 <= n <= weights.d_mlp:
        raise ValueError(f"n: expected 1 to {weights.d_mlp}, the neurons of a layer, got {n}")
    if len(doses) == 0 or not all(0 < dose < math.inf for dose in doses):
        raise ValueError(f"doses: expected at least one, all above 0 and finite, got {list(doses)}")
    texts = Prompts.of(model, prompts)
    stats = activation_stats(model, [row[None] for row in texts.rows], layers=list(lens.layers))
    before = Answers.of(model, texts, batch_size).log_probs
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for layer in lens.layers:
        drawn = torch.randperm(weights.d_mlp, generator=generator)[:n]
        quiet = [index for index in drawn.tolist() if stats[layer, index].std == 0]
        if quiet:
            raise ValueError(
                f"prompts: hook_post of {Neuron(layer, quiet[0])} never changes on them, so it has no standard "
                "deviation to clamp to; give more or longer prompts"
            )
        readings = _readings(weights, lens, layer, drawn)
        clamps = [(Neuron(layer, index), dose * stats[layer, index].std) for index in drawn.tolist() for dose in doses]
        answers = answers_alone(model, texts, clamps, mode=mode, batch_size=batch_size)
        for i, answer in enumerate(track(answers, f"layer {layer}", progress, total=len(clamps))):
            effect = (answer.log_probs - before).mean(0)
            raised = effect.topk(min(10, len(effect))).indices
            for name, scores in readings.items():
                score = scores[i // len(doses)]
                rows.append(
                    {
                        "layer": layer,
                        "dose": doses[i % len(doses)],
                        "reading": name,
                        "correlation": float(torch.corrcoef(torch.stack([score, effect]))[0, 1]),
                        "top_raised": float(score.argmax() in raised),
                    }
                )
    groups = pd.DataFrame(rows).groupby(["layer", "dose", "reading"], as_index=False)
    return groups.agg(
        correlation=("correlation", "mean"),
        correlation_stderr=("correlation", "sem"),
        top_raised=("top_raised", "mean"),
    )


def _readings(
    weights: MLPWeights, lens: JacobianLens, layer: int, neurons: Tensor
) -> dict[str, Float[Tensor, "neuron d_vocab"]]:
    """Logits of write directions, plain and through the lens."""
    W_U = weights.W_U.detach().float()
    if weights.final_gain is not None:
        W_U = weights.final_gain.float()[:, None] * W_U
    if weights.centre:
        W_U = W_U - W_U.mean(0)
    x = weights.directions(layer, "out")[neurons.to(weights.W_U.device)].float()
    return {"plain": (x @ W_U).cpu(), "lens": (lens.carry(x, layer) @ W_U).cpu()}
