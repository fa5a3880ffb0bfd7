"""Does a clamped neuron raise the token that its label names, more than like neurons do?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash import kernel
from tl_flash.clamps import (
    NEUTRAL_PROMPTS,
    ActivationStats,
    Answers,
    Positions,
    Prompts,
    PromptsLike,
    activation_stats,
    answers_alone,
    require_hooks,
)
from tl_flash.evidence.controls import Peers, against
from tl_flash.evidence.labels import own_labels
from tl_flash.lens import JacobianLens, lens_of
from tl_flash.maps import Hit, Hits, NeuronMap
from tl_flash.names import Neuron, NeuronKey
from tl_flash.progress import track
from tl_flash.weights import MLPWeights, read

if TYPE_CHECKING:
    import pandas as pd

DOSE = 5.0
"""What value="auto" clamps to by default, in multiples of the neuron's own largest activation."""
COLUMNS = (
    "neuron", "side", "pole", "token", "value", "dlogit", "dlogp", "rank_before", "rank_after", "output_score",
    "overlap", "kl", "perplexity_ratio", "control_dlogp", "p_value", "q_value", "write_z", "dlogp_low", "dlogp_high",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Validation:
    """What clamps did to the labels of some neurons, beside matched controls."""

    records: tuple[dict[str, Any], ...]
    side: str
    reading: str
    """What gave the labels, in words: the side, and whether a lens."""
    prompts: int
    controls: int
    control_effects: Float[Tensor, "neuron control"]
    """Change of the label's log-probability under each control's clamp, mean over prompts."""
    silent: tuple[str, ...] = ()
    """Neurons left out of all figures: hook_post is 0 on every prompt, so there are no units to clamp them in."""

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a neuron.

        Columns: neuron, side, pole, token, write_z as in the map; `value` that hook_post was set to; means over the
        prompts of `dlogit` (change of the token's logit, vocabulary mean taken off), `dlogp` (of its log-probability,
        nats; its 95% interval `dlogp_low` to `dlogp_high`), `kl` (of the clamped from the unclamped prediction,
        nats), `output_score` ((1 - best rank of the pole's tokens / d_vocab) times their greatest probability), and
        medians of `rank_before`, `rank_after`; `overlap` (share of the pole's k tokens among the k raised most);
        `perplexity_ratio` of the prompts' own text; `control_dlogp` (mean over controls), `p_value` (one-sided) and
        `q_value` (Benjamini-Hochberg over these neurons).
        """
        import pandas as pd

        return pd.DataFrame(self.records, columns=pd.Index(COLUMNS))

    def share_significant(self, level: float = 0.05) -> float:
        """Share of the neurons whose q_value is at most `level`."""
        return sum(record["q_value"] <= level for record in self.records) / len(self.records)

    def share_raised(self) -> float:
        """Share of the neurons whose clamp raised its label."""
        return sum(record["dlogp"] > 0 for record in self.records) / len(self.records)

    def __repr__(self) -> str:
        effect = torch.tensor([record["dlogp"] for record in self.records], dtype=torch.float32).median()
        return (
            f"{len(self.records)} neurons, {self.reading}, {self.prompts} prompts, {self.controls} controls each: "
            f"{self.share_raised():.0%} of labels raised, median {effect:+.2f} nats "
            f"(controls {self.control_effects.median():+.2f}); {self.share_significant():.0%} significant (q <= 0.05)"
            + (f"; {len(self.silent)} silent on the prompts: {', '.join(self.silent)}" if self.silent else "")
        )

    def __str__(self) -> str:
        frame = self.to_frame().drop(columns=["side", "dlogp_low", "dlogp_high"])
        frame["token"] = frame["token"].map(repr)
        return f"{self!r}\n{frame.to_string(index=False, float_format='{:.3g}'.format)}"

    def _repr_html_(self) -> str:
        from html import escape

        frame = self.to_frame()
        frame["token"] = frame["token"].map(repr)
        return f"<p>{escape(repr(self))}</p>{frame.to_html(index=False, border=0, float_format='{:.3g}'.format)}"


def validate(
    model: Any,
    labels: NeuronMap | Hits | Mapping[NeuronKey, str | int],
    *,
    prompts: PromptsLike | None = None,
    chat: bool = False,
    n: int = 50,
    value: float | str = "auto",
    dose: float = DOSE,
    stats: ActivationStats | None = None,
    positions: Positions = None,
    controls: int = 20,
    seed: int = 0,
    lens: JacobianLens | Literal["auto"] | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Validation:
    """Clamp neurons and see whether the tokens that label them are raised.

    Each neuron is clamped alone, and so are its controls: neurons of the same layer drawn from the 3 `controls` whose
    ||W_out|| is nearest to its own, clamped to the same value. The p-value is the chance that a control's effect on the
    same token is as large: a Student prediction interval, the neuron's effect taken for one more draw from the
    distribution of its controls' effects, one-sided.

    Args:
        model: a HookedTransformer or a TransformerBridge; the one that the map was made of.
        labels: a map, whose `n` most specialised neurons are tested; Hits of one; or labels of your own, a token for
            each neuron, such as {"L3N17": " dog"}, which are tested as what W_out writes.
        prompts: texts, token ids or conversations, as `Prompts.of` takes them; by default twenty neutral beginnings.
        chat: each text is what a user says, in the tokenizer's chat template.
        n: how many neurons of a map.
        value: of hook_post, or "auto": `dose` times the neuron's max|hook_post| over the prompts, with the sign that
            raises the label, that of write_z.
        dose: of "auto". The default lies beyond what a neuron does by itself, so that an effect shows; 1 is the most
            that it does by itself on the prompts, or on the texts of `stats`.
        stats: the activations that "auto" takes max|hook_post| from; by default those on the prompts. A neuron that is
            quiet on neutral prompts has its range elsewhere: `activation_stats(model, texts)`.
        positions: which to clamp, as in `clamp`.
        controls: how many a neuron.
        seed: of the draw of controls.
        lens: the one that the map was made with, if it was; "auto" for a map made so.
        batch_size: rows a forward pass, a row being a prompt under one clamp; by default as many as fit 2^26 logits.
        progress: a bar; by default on a terminal or in a notebook.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no neurons, labels of another model or of no neurons' side, fewer than 2 controls or more than the
            layer has; every neuron's hook_post 0 on all prompts, or one missing in the stats (for "auto"); a dose that
            is not above 0; a dose or stats beside a value that does not use them, or a lens beside labels of your own.

    Example:
        >>> validate(model, flash_decode(model, side="out").specialised(2, quantile=0.5), controls=3).side
        'out'
        >>> validate(model, {"L1N3": " dog", "L1N4": " cat"}, controls=3).to_frame()["token"].tolist()
        [' dog', ' cat']
    """
    from scipy.stats import false_discovery_control

    if not isinstance(labels, NeuronMap | Hits | Mapping):
        raise TypeError(
            f"labels: expected a NeuronMap, Hits or a dict of neuron to token, got {type(labels).__name__}; "
            'write {"L3N17": " dog"}'
        )
    labels = labels.specialised(n) if isinstance(labels, NeuronMap) else labels
    if len(labels) == 0:
        raise ValueError("labels: expected at least one neuron, got none (is any specialised?)")
    _require_value(value)
    _require_dose(dose, value)
    if stats is not None and not isinstance(stats, ActivationStats):
        raise TypeError(f"stats: expected what activation_stats gives, got {type(stats).__name__}")
    if stats is not None and value != "auto":
        raise ValueError(
            f'stats: they are units for value="auto", and would not be used with value={value!r}; give one'
        )
    require_hooks(model)
    weights = read(model)
    if isinstance(labels, Mapping) and lens is not None:
        raise ValueError("lens: labels of your own are read without one; expected none, or Hits of a map made with it")
    hits = own_labels(model, weights, labels) if isinstance(labels, Mapping) else labels
    through = None if lens is None else lens_of(model, lens, layers=hits.origin.layers, progress=progress)
    _require_own(weights, hits, through, remade=lens == "auto")
    texts = Prompts.of(model, NEUTRAL_PROMPTS if prompts is None else prompts, chat=chat)
    all_doses = _doses(model, hits, value if value != "auto" else None, dose, stats or texts)
    silent = tuple(str(hit.neuron) for hit, dose in zip(hits, all_doses, strict=True) if dose is None)
    tested = [(hit, dose) for hit, dose in zip(hits, all_doses, strict=True) if dose is not None]
    if not tested:
        raise ValueError(
            f"value: hook_post of {', '.join(silent)} is 0 on all prompts, so there is no unit to clamp it in; give a "
            "value, or stats=activation_stats(model, texts) of texts that they are active on"
        )
    before = Answers.of(model, texts, batch_size)
    peers = Peers(weights, controls, seed)
    records, effects = [], []
    for hit, dose in track(tested, "validating", progress, total=len(tested)):
        token, own = hits.token_id(hit), Neuron.of(hit.neuron)
        clamps = [(neuron, dose) for neuron in (own, *peers.of(own))]
        after, *others = answers_alone(model, texts, clamps, positions=positions, batch_size=batch_size)
        effects.append(torch.stack([(other.log_probs - before.log_probs)[:, token].mean() for other in others]))
        records.append(_record(hits, hit, dose, before, after) | against(effects[-1], before, after, token))
    q_values = false_discovery_control([record["p_value"] for record in records])  # Benjamini and Hochberg's
    for record, q in zip(records, q_values.tolist(), strict=True):
        record["q_value"] = q
    side, reading = hits.origin.side, hits.origin.reading
    return Validation(tuple(records), side, reading, len(texts.rows), controls, torch.stack(effects), silent)


def _require_value(value: Any) -> None:
    if isinstance(value, str) and value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, Real | str):
        raise TypeError(f'value: expected a number or "auto", got {value!r}')
    if isinstance(value, str) or not math.isfinite(value):
        raise ValueError(f'value: expected a number or "auto", finite, got {value!r}')


def _require_dose(dose: Any, value: float | str) -> None:
    if isinstance(dose, bool) or not isinstance(dose, Real):
        raise TypeError(f"dose: expected a number, got {dose!r}")
    if not 0 < float(dose) < math.inf:
        raise ValueError(f"dose: expected a number above 0, got {dose!r}")
    if value != "auto" and dose != DOSE:
        raise ValueError(f'dose: it is of value="auto", and would not be used with value={value!r}; give one')


def _require_own(weights: MLPWeights, hits: Hits, lens: JacobianLens | None, remade: bool) -> None:
    """Refuse labels that this model's weights do not give; of a lens made anew only what it is made of must agree."""
    origin = hits.origin
    if origin.n_experts is not None:
        raise ValueError("labels: of a mixture of experts, whose neurons no hook carries; expected a dense model's map")
    if origin.side not in weights.sides:
        raise ValueError(f'labels: expected a map of side "in", "gate" or "out", got side {origin.side!r}')
    with_lens = origin.source.lens_made if remade else origin.source.lens
    if with_lens != (None if lens is None else lens.source.made if remade else lens.fingerprint):
        raise ValueError("lens: expected the lens that the map was made with, and none where it was made without")
    fold_ln = origin.source.fold_ln
    unembedding = kernel.prepare(
        weights.W_U,
        gain=weights.final_gain if fold_ln else None,
        centre=weights.centre and fold_ln,
        score=origin.score,
    )
    for hit in hits:
        if hit.neuron.layer >= weights.n_layers or hit.neuron.index >= weights.d_mlp:
            raise ValueError(f"labels: {hit.neuron} is no neuron of this model; give the model that was decoded")
    for layer in {hit.neuron.layer for hit in hits}:
        here = [hit for hit in hits if hit.neuron.layer == layer]
        x = weights.directions(layer, origin.side, fold_ln=fold_ln)[[hit.neuron.index for hit in here]]
        if lens is not None and origin.side == "out":
            x = lens.carry(x, layer)
        ids = torch.tensor([[hits.token_id(hit)] for hit in here])
        logits = kernel.token_scores(x, ids, unembedding)[:, 0]
        signed = [hit.logit if hit.pole == "positive" else -hit.logit for hit in here]
        listed = torch.tensor(signed, dtype=torch.float32)
        far = (logits - listed).abs() > 0.02 * listed.abs() + 1e-6
        if far.any():
            hit = here[int(far.nonzero()[0])]
            raise ValueError(
                f"labels: the map gives {hit.neuron} the logit {hit.logit:.4g} for {hit.token!r}, this model "
                f"{float(logits[int(far.nonzero()[0])]):.4g}; it is a map of another model, or of other weights"
            )


def _doses(
    model: Any, hits: Hits, value: float | str | None, dose: float, units: ActivationStats | Prompts
) -> list[float | None]:
    """What to clamp each neuron to, None where it is silent: one value, or where there is none multiples of its own."""
    if value is not None:
        return [float(value)] * len(hits)
    if isinstance(units, Prompts):
        layers = sorted({hit.neuron.layer for hit in hits})
        units = activation_stats(model, [row[None] for row in units.rows], layers=layers)
    largest = [units.abs_max_of(hit.neuron) for hit in hits]
    return [dose * most * hit.sign if most else None for most, hit in zip(largest, hits, strict=True)]


def _record(hits: Hits, hit: Hit, value: float, before: Answers, after: Answers) -> dict[str, Any]:
    token, top = hits.token_id(hit), hits.pole_ids(hit)
    raised = (after.log_probs - before.log_probs).mean(0).topk(len(top)).indices
    probs = after.log_probs[:, top].exp().amax(1)
    best_rank = torch.stack([after.ranks(id) for id in top.tolist()]).amin(0)
    return {
        "neuron": str(hit.neuron),
        "side": hits.origin.side,
        "pole": hit.pole,
        "token": hit.token,
        "value": value,
        "dlogit": float((after.logits - before.logits)[:, token].mean()),
        "rank_before": float(before.ranks(token).double().median()),
        "rank_after": float(after.ranks(token).double().median()),
        "output_score": float(((1 - best_rank / after.logits.shape[1]) * probs).mean()),
        "overlap": len(set(top.tolist()) & set(raised.tolist())) / len(top),
        "kl": float((before.log_probs.exp() * (before.log_probs - after.log_probs)).sum(-1).mean()),
        "perplexity_ratio": float((after.nll - before.nll).nanmean().exp()),
        "write_z": hit.write_z,
    }
