"""What each neuron's activation does on real text: the units to clamp it in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.clamps.positions import PositionName, Positions, parse_positions
from tl_flash.clamps.prompts import Prompts, PromptsLike
from tl_flash.clamps.sites import attached, neuron_site, refuse_block_hook, run_to
from tl_flash.names import Neuron, NeuronLike
from tl_flash.progress import track
from tl_flash.weights import chosen_layers, measuring

if TYPE_CHECKING:
    import pandas as pd


class NeuronStats(NamedTuple):
    """One neuron's activation over the prompts."""

    mean: float
    std: float
    min: float
    max: float
    abs_max: float
    quantiles: dict[float, float]


@dataclass(frozen=True, eq=False)
class ActivationStats:
    """How hook_post of every neuron is distributed over the positions of the prompts."""

    layers: tuple[int, ...]
    count: int
    """Positions measured."""
    mean: Float[Tensor, "layer neuron"]
    std: Float[Tensor, "layer neuron"]
    """Of the positions measured, not an estimate for others: divided by `count`."""
    min: Float[Tensor, "layer neuron"]
    max: Float[Tensor, "layer neuron"]
    levels: tuple[float, ...]
    quantiles: Float[Tensor, "level layer neuron"]
    sampled: int
    """Positions that the quantiles come from: all where it equals `count`, else drawn at random."""

    @property
    def abs_max(self) -> Float[Tensor, "layer neuron"]:
        """The largest absolute activation."""
        return torch.maximum(self.max, -self.min)

    def __getitem__(self, neuron: NeuronLike) -> NeuronStats:
        """One neuron's statistics.

        Raises:
            KeyError: its layer was not measured, or has no such neuron.
        """
        layer, index = Neuron.of(neuron)
        if layer not in self.layers or index >= self.mean.shape[1]:
            raise KeyError(f"neuron {neuron}: measured were layers {self.layers}, {self.mean.shape[1]} neurons in each")
        at = self.layers.index(layer), index
        return NeuronStats(
            mean=float(self.mean[at]),
            std=float(self.std[at]),
            min=float(self.min[at]),
            max=float(self.max[at]),
            abs_max=float(self.abs_max[at]),
            quantiles=dict(zip(self.levels, self.quantiles[:, at[0], at[1]].tolist(), strict=True)),
        )

    def abs_max_of(self, neuron: NeuronLike) -> float:
        """One neuron's largest absolute activation; raises KeyError as indexing does."""
        return self[neuron].abs_max

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a neuron; a level's quantile is in its column q0.5 or the like."""
        import pandas as pd

        n_layers, d_mlp = self.mean.shape
        layer = torch.tensor(self.layers).repeat_interleave(d_mlp).tolist()
        index = torch.arange(d_mlp).repeat(n_layers).tolist()
        columns: dict[str, Any] = {"neuron": [str(Neuron(*at)) for at in zip(layer, index, strict=True)]}
        columns |= {"layer": layer, "index": index}
        columns |= {name: getattr(self, name).flatten() for name in ("mean", "std", "min", "max", "abs_max")}
        columns |= {f"q{q:g}": row.flatten() for q, row in zip(self.levels, self.quantiles, strict=True)}
        return pd.DataFrame(columns)


def activation_stats(
    model: Any,
    prompts: PromptsLike,
    *,
    chat: bool = False,
    layers: Sequence[int] | None = None,
    positions: Positions = None,
    include_bos: bool = False,
    quantiles: Sequence[float] = (0.01, 0.1, 0.5, 0.9, 0.99),
    sample: int = 1024,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> ActivationStats:
    """Measure how each neuron's hook_post is distributed over prompts, so that a clamp can be given in its own units.

    Activations are never kept: mean and standard deviation are merged batch by batch in float64 (Chan's formula).
    Quantiles are exact where the prompts have at most `sample` positions; of more, they are those of that many,
    drawn uniformly without replacement and alike for all neurons, and they alone need memory: `sample` x neurons.
    The model runs with whatever hooks it has, so that under a clamp it is the clamped model that is measured.

    Args:
        model: a HookedTransformer or a TransformerBridge with dense MLPs.
        prompts: texts, token ids, what a tokenizer returns, or conversations, as `Prompts.of` takes them. Prompts of
            one length share a batch, so none is ever padded.
        chat: each text is what a user says, in the tokenizer's chat template.
        layers: which layers; all by default.
        positions: None for all, "last" for each prompt's last, or indices from 0.
        include_bos: measure also a beginning-of-sequence token at position 0. Attention sinks there drive some neurons
            to values that they have nowhere else (arXiv 2402.17762), which would be the maximum of any text.
        quantiles: levels in 0 to 1; linear interpolation between the two nearest values.
        sample: positions to take quantiles from.
        batch_size: prompts at once.
        seed: of the draw.
        progress: a bar; by default on a terminal or in a notebook.

    Returns:
        ActivationStats: float32 [layer, neuron] on the CPU.

    Raises:
        TypeError: the model has no TransformerLens hooks, or the prompts are of another kind.
        ValueError: no prompts, an empty one or one longer than n_ctx; no position left to measure; an index that a
            prompt has not; a layer without a dense MLP; a level outside 0 to 1; activations that are not finite.

    Example:
        >>> from tl_flash import activation_stats
        >>> stats = activation_stats(model, ["the dog saw a cat"])["L1N3"]
        >>> stats.min <= stats.quantiles[0.5] <= stats.max
        True
    """
    if not quantiles or not all(0 <= level <= 1 for level in quantiles):
        raise ValueError(f"quantiles: expected levels from 0 to 1, got {tuple(quantiles)}")
    if sample < 1:
        raise ValueError(f"sample: expected 1 or more, got {sample}")
    texts = Prompts.of(model, prompts, chat=chat)
    rows = texts.rows
    keep = [_kept(model, row, parse_positions(positions), include_bos) for row in rows]
    drawn = _draw(keep, sample, seed)
    chosen = tuple(chosen_layers(layers, len(model.blocks)))
    tallies = {neuron_site(model, layer, "post").name: _Tally() for layer in chosen}
    device = model.W_U.device
    with measuring(model):
        for batch, tokens in track(list(texts.batches(batch_size)), "measuring activations", progress):
            kept, draws = (torch.stack([each[i] for i in batch]).to(device) for each in (keep, drawn))
            hooks = [(name, partial(tally.add, keep=kept, drawn=draws)) for name, tally in tallies.items()]
            with attached(model, hooks):
                run_to(model, tokens, max(chosen))
    return _assemble(chosen, tallies, tuple(map(float, quantiles)), int(sum(row.sum() for row in keep)))


def _kept(model: Any, row: Tensor, positions: PositionName | frozenset[int] | None, include_bos: bool) -> Tensor:
    """Which positions of a prompt to measure, bool [position]."""
    keep = torch.zeros(len(row), dtype=torch.bool)
    if positions is None or positions == "prompt":
        keep[:] = True
    elif positions == "last":
        keep[-1] = True
    elif isinstance(positions, str):
        raise ValueError(f'positions: expected None, "last" or indices, got {positions!r}; nothing is generated here')
    elif max(positions) >= len(row):
        raise ValueError(f"positions: expected indices below {len(row)}, the shortest prompt's length, got {positions}")
    else:
        keep[sorted(positions)] = True
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    if not include_bos and int(row[0]) == bos:
        keep[0] = False
    return keep


def _draw(keep: list[Tensor], sample: int, seed: int) -> list[Tensor]:
    """Of the positions measured, `sample` at random (or all, where there are fewer), bool [position] a prompt."""
    lengths = [len(row) for row in keep]
    kept = torch.cat(keep).nonzero()[:, 0]
    if len(kept) == 0:
        raise ValueError("prompts: nothing to measure but beginning-of-sequence tokens; pass include_bos=True")
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(sum(lengths), dtype=torch.bool)
    drawn[kept[order[:sample]]] = True
    return list(drawn.split(lengths))


class _Tally:
    """What is known so far of one layer's activations, each [neuron]."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)
        self.min = torch.tensor(torch.inf, dtype=torch.float64)
        self.max = torch.tensor(-torch.inf, dtype=torch.float64)
        self.samples: list[Tensor] = []

    def add(self, act: Tensor, hook: Any, *, keep: Tensor, drawn: Tensor) -> None:
        """Take in a batch: act [batch, position, neuron], keep and drawn [batch, position]."""
        refuse_block_hook(hook.name)
        self.samples.append(act[drawn].float().cpu())
        rows = act[keep].cpu().double()  # [kept, neuron]
        if len(rows) == 0:
            return
        self.min = torch.minimum(self.min, rows.amin(0))
        self.max = torch.maximum(self.max, rows.amax(0))
        mean = rows.mean(0)
        count = self.count + len(rows)
        step = mean - self.mean
        self.squares = self.squares + (rows - mean).square().sum(0) + step.square() * self.count * len(rows) / count
        self.mean = self.mean + step * len(rows) / count
        self.count = count


def _assemble(
    layers: tuple[int, ...], tallies: dict[str, _Tally], levels: tuple[float, ...], count: int
) -> ActivationStats:
    for name, tally in tallies.items():
        if tally.count != count:
            raise RuntimeError(f"{name} saw {tally.count} of {count} positions; the model does not pass through it")
        if not torch.isfinite(tally.mean).all():
            raise ValueError(f"model: {name} is not finite on these prompts; nothing can be said of its neurons")

    def stack(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value.float() for value in values])

    every = list(tallies.values())
    samples = [torch.cat(tally.samples) for tally in every]  # [sampled, neuron] each
    return ActivationStats(
        layers=layers,
        count=count,
        mean=stack(tally.mean for tally in every),
        std=stack((tally.squares / count).sqrt() for tally in every),
        min=stack(tally.min for tally in every),
        max=stack(tally.max for tally in every),
        levels=levels,
        quantiles=stack(_quantiles(rows, levels) for rows in samples).transpose(0, 1),
        sampled=len(samples[0]),
    )


def _quantiles(rows: Float[Tensor, "sampled neuron"], levels: tuple[float, ...]) -> Float[Tensor, "level neuron"]:
    """As `torch.quantile`, which refuses more than 16 million numbers."""
    ordered = rows.sort(0).values
    at = torch.tensor(levels, dtype=torch.float64) * (len(rows) - 1)
    low, high = ordered[at.floor().long()], ordered[at.ceil().long()]
    return torch.lerp(low, high, at.frac().float()[:, None])


def residual_length(model: Any, prompts: Prompts, layers: Iterable[int]) -> dict[int, float]:
    """Root mean square length of the residual stream after each of some layers, over all positions but the first.

    The first is left out, where attention sinks make it many times longer; of a prompt of one token it counts.

    Example:
        >>> from tl_flash.clamps import Prompts, residual_length
        >>> residual_length(model, Prompts.of(model, ["the dog saw a cat"]), [1])[1] > 0
        True
    """
    chosen = tuple(layers)
    squares = {f"blocks.{layer}.hook_resid_post": 0.0 for layer in chosen}
    count = 0

    def see(residual: Tensor, hook: Any, *, name: str) -> Tensor:
        squares[name] += float(residual[:, min(1, residual.shape[1] - 1) :].double().square().sum())
        return residual

    with measuring(model), attached(model, [(name, partial(see, name=name)) for name in squares]):
        for _, tokens in prompts.batches(8):
            count += tokens.shape[0] * max(tokens.shape[1] - 1, 1)
            run_to(model, tokens, max(chosen, default=0))
    return {int(name.split(".")[1]): (total / count) ** 0.5 for name, total in squares.items()}
