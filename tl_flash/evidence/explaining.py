"""From a prompt to its neurons: which made the model predict a token, and is it true?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_flash.clamps import ActivationStats, Prompts, activation_stats
from tl_flash.decode import decode_directions
from tl_flash.evidence.ablation import Ablation, counts_to
from tl_flash.evidence.attribution import Attribution, attribute, require_dense
from tl_flash.evidence.curve import Curve
from tl_flash.evidence.explanation import ExplainedNeuron, Explanation
from tl_flash.lens import JacobianLens, Rule, lens_of, own_texts, require_rule
from tl_flash.maps import require_count
from tl_flash.names import Neuron
from tl_flash.vocab import Vocab, writes_what_it_reads
from tl_flash.weights import MLPWeights, read

_LONG = 0.1
"""Of the residual stream: what writes more is not told by first order, and is measured."""
_MOST_LONG = 128
_LIKE = 8
"""Neurons of the nearest activations, of which a control is drawn."""
_EVERY = 4
"""Of the package's own texts one in so many gives the range of activations."""


def explain(
    model: Any,
    prompt: Any,
    *,
    token: str | int | None = None,
    against: str | int | None = None,
    n: int = 20,
    measure: bool = True,
    rule: Rule = "gradient",
    reference: Literal["zero", "mean"] = "zero",
    stats: ActivationStats | None = None,
    lens: JacobianLens | Literal["auto"] | None = None,
    chat: bool = False,
    include_bos: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Explanation:
    """Find the neurons that made a model predict a token after a prompt, and measure whether they did.

    A neuron at a position gets (activation - reference) times the gradient of the token's logit by it, through all
    later layers: what setting it to its reference would take from the logit, to first order. One forward and one
    backward pass give this for all. First order does not hold where a neuron writes much beside the residual stream,
    as some of the first layer do; with `measure` those are set to their references in turn, and so are the n first of
    the result, which is then ranked by what was measured wherever it was.

    Args:
        model: a HookedTransformer or a TransformerBridge with dense MLPs.
        prompt: a text, token ids, or a conversation, as one of those that `Prompts.of` takes.
        token: whose logit to explain; by default the predicted one's.
        against: a token whose logit is taken off; by default the mean over the vocabulary is.
        n: how many neurons to name.
        measure: set the n first, as many random neurons with like activations, and up to 128 that write long, to their
            references one by one; keep and remove growing numbers of neurons, from the largest attribution to the
            smallest (`Explanation.curve`); and run some of the package's own texts where no stats are given.
        rule: of the backward pass, as in `tl_flash.lens.linearised`: "gradient" foretells best what the removal of one
            neuron does; "frozen" and "relp" (arXiv 2508.21258) share the logit out among them, and "relp" finds sooner
            the neurons that suffice together.
        reference: what a neuron is set to: "zero", or its "mean" over the stats.
        stats: of reference texts, by `activation_stats` with all layers; by default of 16 of the package's own texts.
        lens: labels what neurons write through the rest of the model, as in `flash_decode`.
        chat: the text is what a user says, in the tokenizer's chat template.
        include_bos: rank also the neurons at a beginning-of-sequence token, which are alike in every prompt.
        seed: of the draw of controls, and of the random order.
        batch_size: rows of a forward pass of measuring; by default some 512 tokens.
        progress: a bar; by default on a terminal or in a notebook.

    Returns:
        Explanation: prints as a table; `.to_frame()`, `.curve`, `.to_dict()`.

    Raises:
        TypeError: the model has no TransformerLens hooks, or an argument is of another kind.
        ValueError: an unknown token, rule or reference; no prompt, several, or one longer than n_ctx; a mixture of
            experts; stats of other layers; more neurons than there are; what the rule or the lens refuses.

    Example:
        >>> found = explain(model, "the dog saw a", token=" cat", n=3, measure=False)
        >>> len(found), found.token, found.at(4) == tuple(one for one in found if one.position == 4)
        (3, ' cat', True)
    """
    require_rule(rule)
    if reference not in ("zero", "mean"):
        raise ValueError(f'reference: expected "zero" or "mean", got {reference!r}')
    d_mlp = require_dense(model)
    texts = Prompts.of(model, [prompt], chat=chat)
    if len(texts.rows) != 1:
        raise ValueError(f"prompt: expected one, got {len(texts.rows)}; explain them one by one")
    row, weights = texts.rows[0], read(model)
    asked, beside = (None if one is None else weights.vocab.id(one) for one in (token, against))
    if against is not None and asked == beside:
        raise ValueError(f"against: expected another token than {token!r}, which is explained")
    first = int(_begins(model, row) and not include_bos)
    spots = (len(row) - first) * len(model.blocks) * d_mlp
    if not 1 <= n <= spots:
        raise ValueError(f"n: expected 1 to {spots}, the neurons at positions that are ranked, got {n}")
    made = None if lens is None else lens_of(model, lens, progress=progress)
    if made is not None:
        made.require_model(weights)
    if batch_size is not None:
        require_count("batch_size", batch_size)
    stats = _reference_stats(model, stats, d_mlp, measure or reference == "mean", reference, progress)
    zeros = torch.zeros(len(model.blocks), d_mlp)
    values = zeros if reference == "zero" or stats is None else stats.mean
    seen = attribute(model, row, asked, beside, rule)
    found = _Found(seen, seen.strength(values), seen.lengths(weights), first)
    generator = torch.Generator().manual_seed(seed)
    ablation = Ablation(model, row, seen.target, values, batch_size, progress)
    if measure:
        found.measure(ablation, n)
    chosen = found.order()[:n]
    controls = torch.full((n,), torch.nan)
    if measure:
        controls = ablation.alone(found.controls(chosen, values, generator)).to(controls) - seen.score
    labels = _Named.of(model, weights, found, chosen, made)
    same = writes_what_it_reads(model)
    vocab = weights.vocab if same else Vocab.of_tokenizer(getattr(model, "tokenizer", None), model.cfg.d_vocab)
    strings = tuple(vocab.string(id) for id in row.tolist())
    total = float(found.first_order.abs().sum())
    neurons = []
    for i, spot in enumerate(chosen.tolist()):
        layer, position, index = found.place(spot)
        neuron = Neuron(layer, index)
        act, gives = float(seen.act[layer, position, index]), float(found.first_order.flatten()[spot])
        neurons.append(
            ExplainedNeuron(
                neuron=neuron,
                position=position,
                at=strings[position],
                activation=act,
                level=float("nan") if stats is None else _level(stats, neuron, act),
                attribution=gives,
                share=gives / total if total else 0.0,
                effect=float(found.effects[spot]),
                control_effect=float(controls[i]),
                length=float(found.lengths.flatten()[spot]),
                label_in=labels.reads[i],
                label_out=labels.writes[i],
                write_z=labels.write_z[i],
            )
        )
    return Explanation(
        model=weights.name,
        prompt=strings,
        token=weights.vocab.string(seen.target.token),
        token_id=seen.target.token,
        against=None if seen.target.against is None else weights.vocab.string(seen.target.against),
        logit=seen.score,
        prob=seen.prob,
        rule=rule,
        reference=reference,
        lens=None if made is None else made.fingerprint,
        neurons=tuple(neurons),
        places=found.first_order.sum(-1),
        flow=seen.flow,
        curve=_curve(ablation, found, seen.score, generator) if measure else None,
    )


class _Found:
    """All spots of a prompt, what each gives to first order, and what was measured of some."""

    def __init__(self, seen: Attribution, strength: Tensor, lengths: Tensor, first: int) -> None:
        self.seen, self.lengths = seen, lengths
        self.first_order = strength.clone()
        self.first_order[:, :first] = 0
        ranked = torch.zeros_like(strength, dtype=torch.bool)
        ranked[:, first:] = True
        self.ranked = ranked.flatten()
        self.effects = torch.full((strength.numel(),), torch.nan, dtype=torch.float64)

    def place(self, spot: int) -> tuple[int, int, int]:
        """Its layer, position and neuron."""
        layer, position, index = np.unravel_index(spot, self.first_order.shape)
        return int(layer), int(position), int(index)

    def order(self) -> Int[Tensor, " spot"]:
        """All ranked spots, most to least, by what was measured where it was."""
        gives = self.first_order.flatten().double()
        gives = torch.where(self.effects.isnan(), gives, -self.effects).abs()
        return gives.masked_fill(~self.ranked, -1).argsort(descending=True, stable=True)[: int(self.ranked.sum())]

    def signed_order(self) -> Int[Tensor, " spot"]:
        """All ranked spots, from what raises the score most to what lowers it most, to first order."""
        gives = self.first_order.flatten().masked_fill(~self.ranked, -torch.inf)
        return gives.argsort(descending=True, stable=True)[: int(self.ranked.sum())]

    def measure(self, ablation: Ablation, n: int) -> None:
        """Those that write long, and the n first, until all these are measured."""
        lengths = self.lengths.flatten().masked_fill(~self.ranked, 0)
        long = lengths.topk(min(_MOST_LONG, len(lengths)))
        asked = torch.cat([self.order()[:n], long.indices[long.values > _LONG]]).unique()
        while len(asked):
            self.effects[asked] = ablation.alone(asked).double() - self.seen.score
            first = self.order()[:n]
            asked = first[self.effects[first].isnan()]

    def controls(
        self, chosen: Int[Tensor, " n"], reference: Float[Tensor, "layer neuron"], generator: torch.Generator
    ) -> Int[Tensor, " n"]:
        """For each spot one of the same layer and position, drawn from those of the nearest activations."""
        moves = (self.seen.act - reference[:, None].to(self.seen.act)).abs()
        taken, drawn = set(chosen.tolist()), []
        for spot in chosen.tolist():
            layer, position, index = self.place(spot)
            near = (moves[layer, position] - moves[layer, position, index]).abs().argsort(stable=True)
            own = spot - index
            like = [own + i for i in near[: _LIKE + len(taken) + 1].tolist() if own + i not in taken][:_LIKE] or [spot]
            drawn.append(like[int(torch.randint(len(like), (), generator=generator))])
        return torch.tensor(drawn)


@dataclass(frozen=True)
class _Named:
    """What the weights of neurons say."""

    reads: list[str]
    writes: list[str]
    write_z: list[float]

    @classmethod
    def of(
        cls, model: Any, weights: MLPWeights, found: _Found, chosen: Int[Tensor, " n"], lens: JacobianLens | None
    ) -> _Named:
        """Labels at the poles that neurons are at in the prompt."""
        places = [found.place(spot) for spot in chosen.tolist()]
        reads, writes = [], []
        for layer, position, index in places:
            one = slice(index, index + 1)
            into = weights.directions(layer, "in", neurons=one)
            out = weights.directions(layer, "out", neurons=one)
            reads.append(into * (1 if found.seen.read[layer, position, index] >= 0 else -1))
            writes.append(out if lens is None else lens.carry(out, layer))
        target, n = found.seen.target.token, len(places)
        read_out = decode_directions(torch.cat(reads + writes), model, k=1, tokens=[target])
        tops = [pole.strings[0, :, 0].tolist() for pole in (read_out.positive, read_out.negative)]
        signs = [int(found.seen.act[place] < 0) for place in places]
        z = (read_out.tracked[target] / read_out.std)[0, n:].tolist()
        return cls(tops[0][:n], [tops[sign][n + i] for i, sign in enumerate(signs)], z)


def _curve(ablation: Ablation, found: _Found, whole: float, generator: torch.Generator) -> Curve:
    order = found.signed_order()
    shuffled = order[torch.randperm(len(order), generator=generator)]
    counts = counts_to(len(order))
    sets = [part for some in (order, shuffled) for at in counts for part in (some[at:], some[:at])]
    scores = ablation.scores([order, *sets], "keeping and removing neurons")
    by_order = scores[1:].view(2, len(counts), 2)
    kept, removed = by_order[0].unbind(-1)
    kept_random, removed_random = by_order[1].unbind(-1)
    return Curve(tuple(counts), whole, float(scores[0]), kept, removed, kept_random, removed_random)


def _reference_stats(
    model: Any, stats: ActivationStats | None, d_mlp: int, needed: bool, reference: str, progress: bool | None
) -> ActivationStats | None:
    """Those given; else, where they are needed and there is a tokenizer, of some of the package's own texts."""
    if stats is not None:
        if not isinstance(stats, ActivationStats):
            raise TypeError(f"stats: expected what activation_stats gives, got {type(stats).__name__}")
        if stats.layers != tuple(range(len(model.blocks))) or stats.mean.shape[1] != d_mlp:
            raise ValueError(
                f"stats: expected all {len(model.blocks)} layers of {d_mlp} neurons, got layers {stats.layers} of "
                f"{stats.mean.shape[1]}; make them with activation_stats(model, texts)"
            )
        return stats
    if not needed:
        return None
    if getattr(model, "tokenizer", None) is None:
        if reference == "mean":
            raise ValueError(
                'reference: "mean" needs reference texts, and this model has no tokenizer for the package\'s own; '
                "give stats=activation_stats(model, token ids)"
            )
        return None
    return activation_stats(model, own_texts(model).rows[::_EVERY], progress=progress)


def _level(stats: ActivationStats, neuron: Neuron, act: float) -> float:
    """Where an activation lies among those measured: linear between the quantiles that are kept."""
    one = stats[neuron]
    return float(np.interp(act, [one.min, *one.quantiles.values(), one.max], [0.0, *one.quantiles, 1.0]))


def _begins(model: Any, row: Tensor) -> bool:
    """Whether a longer prompt begins with the beginning-of-sequence token."""
    return len(row) > 1 and int(row[0]) == getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
