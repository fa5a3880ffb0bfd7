"""Where weights, kernel and map meet: decode every neuron of a model, or any directions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor

from tl_flash import kernel, models
from tl_flash.kernel import Readout, Unembedding
from tl_flash.lens import JacobianLens
from tl_flash.neuron_map import NeuronMap, Source, Tracked
from tl_flash.null import Null
from tl_flash.progress import track
from tl_flash.top_tokens import TopTokens
from tl_flash.vocab import Vocab
from tl_flash.weights import fingerprint, is_centred, require_side

NULL_DRAWS = 1024
"""Shuffled directions a layer; both poles of each count, so the null holds twice as many values."""
_FEWEST_TO_SHUFFLE = 32


def flash_decode(
    model: Any,
    *,
    side: str = "in",
    score: str = "dot",
    k: int = 10,
    layers: Sequence[int] | None = None,
    fold_ln: bool = True,
    tokens: Sequence[str | int] | None = None,
    ignore_tokens: Sequence[str | int] | None = None,
    lens: JacobianLens | None = None,
    precision: str = "exact",
    device: str | torch.device | None = None,
    max_bytes: int | None = None,
    progress: bool | None = None,
    tokenizer: Any = None,
) -> NeuronMap:
    """Decode every MLP neuron of a model into the tokens that its weights stand for.

    Each neuron's weight vector x is read through the unembedding (Davies 2025, arXiv 2501.02688, "Flash
    Interpretability"): the logits x @ W_U' minus their vocabulary mean, and the probabilities
    softmax(unembed(ln_final(x))) without bias or softcap. Both x and -x are decoded, since a gated neuron's
    activation takes both signs. A label of side "in" names the token whose direction drives the neuron; whether the
    neuron promotes that token is another matter, of which `write_z` gives a first idea and a clamp the proof.

    Args:
        model: a HookedTransformer or subclass, a TransformerBridge (with or without compatibility mode), or a
            Hugging Face causal LM.
        side: which vector of a neuron: "in" (W_in, the up-projection in a gated MLP), "gate" (W_gate) or "out" (W_out).
        score: "dot" (the paper's), or "cosine" of direction and unembedding column, for which `logits` are cosines, z
            is the cosine over its standard deviation, and there are no probabilities. A model loaded with
            center_unembed, as `from_pretrained` does, has other cosines than one loaded without; `source` says which.
        k: tokens to keep at each pole.
        layers: which layers; all by default.
        fold_ln: fold the norms' scales in as `HookedTransformer.from_pretrained` does. The result then does not
            depend on how the model was loaded. False reads the weights as the model holds them: on an unprocessed
            model the paper's literal ``lm_head @ up_proj``.
        tokens: tokens whose logits to keep for every neuron, in `NeuronMap.tracked`.
        ignore_tokens: tokens never to report (special or untrained ones). Statistics still run over the whole
            vocabulary. Ids past the tokenizer's vocabulary are never reported.
        lens: carries what neurons write through the mean Jacobian of the rest of the model (`jacobian_lens`): side
            "out" then decodes J @ W_out, the neuron's effect on the output to first order, and `write_z` of every
            side is through the lens.
        precision: "exact" proves every neuron's top tokens; "fast" leaves out the proof.
        device: where to compute; by default where W_U is.
        max_bytes: scratch memory.
        progress: a bar; by default on a terminal or in a notebook.
        tokenizer: names the tokens of a model that holds no tokenizer, such as a Hugging Face one.

    Returns:
        NeuronMap: tensors [layer, neuron, ...] on the CPU.

    Raises:
        TypeError: `model` is none of the above.
        ValueError: an unknown side, score, precision, layer or token, no layers, a k below 1 or above what can be
            reported, a layer without a dense MLP, NaN or infinite weights, or a lens of another model, without a
            layer asked for, or with `fold_ln=False`.

    Example:
        >>> neurons = flash_decode(model, k=3)
        >>> neurons.positive.ids.shape == (model.cfg.n_layers, neurons.d_mlp, 3)
        True
        >>> neurons["L0N5"].positive[0].token == neurons.positive.strings[0, 5, 0]
        True
    """
    weights = models.read(model, tokenizer=tokenizer)
    chosen = models.chosen_layers(layers, weights.n_layers)
    require_side(side, weights.sides)
    if lens is not None:
        lens.require_model(weights)
        if not fold_ln:
            raise ValueError("lens: it reads folded weights; expected fold_ln=True beside it, got False")
    vocab = weights.vocab
    tracked = vocab.ids(tokens or [])
    unembedding = kernel.prepare(
        weights.W_U,
        gain=weights.final_gain if fold_ln else None,
        centre=weights.centre and fold_ln,
        score=score,
        ignore=vocab.nameless() + vocab.ids(ignore_tokens or []),
        device=device,
        precision=precision,
    )
    uncentred = weights.centre and not fold_ln
    readouts, draws, write_z = [], [], []
    for layer in track(chosen, f'decoding "{side}"', progress):
        writes = weights.directions(layer, "out", fold_ln=fold_ln)
        if lens is not None:
            writes = lens.carry(writes, layer)
        x = writes if side == "out" else weights.directions(layer, side, fold_ln=fold_ln)
        rows = torch.cat([x, _shuffled(x, seed=layer)])
        norm = (rows - rows.mean(-1, keepdim=True)).norm(dim=-1) if uncentred else None
        try:
            both = kernel.decode(rows, unembedding, k=k, tracked=tracked, norm=norm, max_bytes=max_bytes)
        except ValueError as error:
            raise ValueError(f"layer {layer}, side {side!r}: {error}") from error
        readouts.append(_rows(both, slice(len(x))))
        draws.append(_rows(both, slice(len(x), None)))
        write_z.append(_write_z(writes, readouts[-1].ids, unembedding))
    return _assemble(
        readouts,
        write_z,
        draws,
        vocab,
        tracked,
        side=side,
        score=score,
        n_layers=weights.n_layers,
        layers=tuple(chosen),
        d_model=weights.d_model,
        source=Source(
            model=weights.name,
            model_class=weights.class_name,
            fingerprint=weights.fingerprint(chosen, side),
            dtype=weights.dtype,
            fold_ln=fold_ln,
            lens=None if lens is None else lens.fingerprint,
            center_unembed=is_centred(weights.W_U),
            precision=precision,
            repaired=sum(readout.repaired for readout in readouts),
            versions=_versions(),
        ),
    )


@jaxtyped(typechecker=beartype)
def decode_directions(
    directions: Float[Tensor, "n d_model"],
    model_or_W_U: Any,
    *,
    score: str = "dot",
    k: int = 10,
    fold_ln: bool = True,
    tokens: Sequence[str | int] | None = None,
    ignore_tokens: Sequence[str | int] | None = None,
    layer: int | None = None,
    lens: JacobianLens | None = None,
    precision: str = "exact",
    device: str | torch.device | None = None,
    max_bytes: int | None = None,
    tokenizer: Any = None,
) -> NeuronMap:
    """Decode any directions of the residual stream: SAE decoder rows, transcoders, probes, steering vectors.

    Args:
        directions: a direction a row, in the basis of the model's residual stream (of an unprocessed model, where
            the model is one).
        model_or_W_U: a model as `flash_decode` takes it, whose final norm's scale is folded in, or an unembedding
            [d_model, d_vocab] that is used as it is.
        score: as in `flash_decode`, and so are k, fold_ln, tokens, ignore_tokens, precision, device, max_bytes and
            tokenizer.
        k: tokens to keep at each pole.
        fold_ln: fold the final norm's scale in.
        tokens: tokens whose logits to keep.
        ignore_tokens: tokens never to report.
        layer: after which the directions are written to the residual stream; a lens needs to know.
        lens: carries the directions through the rest of the model, as in `flash_decode`.
        precision: "exact" or "fast".
        device: where to compute.
        max_bytes: scratch memory.
        tokenizer: names the tokens.

    Returns:
        NeuronMap of one layer, 0, with side "direction": direction i is "L0N<i>", and `write_z` is its own z-score.
        From 32 directions on it has a null, which shuffles each coordinate over the directions given.

    Raises:
        TypeError: wrong shapes, or no model.
        ValueError: as in `flash_decode`; or directions that are empty, zero, or not finite.

    Example:
        >>> dictionary = torch.randn(100, model.cfg.d_model)
        >>> decode_directions(dictionary, model, k=3).positive.ids.shape
        torch.Size([1, 100, 3])
    """
    if len(directions) == 0:
        raise ValueError("directions: expected at least one row, got none")
    if torch.is_tensor(model_or_W_U):
        weights = None
        W_U, gain, centre, vocab = model_or_W_U, None, False, Vocab.of_tokenizer(tokenizer, model_or_W_U.shape[-1])
        name, class_name = "unembedding", "Tensor"
    else:
        weights = models.read(model_or_W_U, tokenizer=tokenizer)
        W_U, vocab, name, class_name = weights.W_U, weights.vocab, weights.name, weights.class_name
        gain, centre = (weights.final_gain, weights.centre) if fold_ln else (None, False)
    carried = directions.detach()
    if lens is not None or layer is not None:
        if lens is None or layer is None or weights is None or not fold_ln:
            raise ValueError(
                "lens: expected a lens, its layer, a model and fold_ln=True together, got only some of them"
            )
        lens.require_model(weights)
        carried = lens.carry(carried, layer)
    tracked = vocab.ids(tokens or [])
    unembedding = kernel.prepare(
        W_U,
        gain=gain,
        centre=centre,
        score=score,
        ignore=vocab.nameless() + vocab.ids(ignore_tokens or []),
        device=device,
        precision=precision,
    )
    x = carried
    drawn = _shuffled(x, seed=0) if len(x) >= _FEWEST_TO_SHUFFLE else x[:0]
    both = kernel.decode(torch.cat([x, drawn]), unembedding, k=k, tracked=tracked, max_bytes=max_bytes)
    readout = _rows(both, slice(len(x)))
    signs = torch.tensor([1.0, -1.0])[:, None, None]
    return _assemble(
        [readout],
        [signs * readout.logits / readout.std[:, None]],
        [_rows(both, slice(len(x), None))] if len(drawn) else None,
        vocab,
        tracked,
        side="direction",
        score=score,
        n_layers=1,
        layers=(0,),
        d_model=x.shape[1],
        source=Source(
            model=name,
            model_class=class_name,
            fingerprint=fingerprint(W_U.T, directions),
            dtype=str(directions.dtype).removeprefix("torch."),
            fold_ln=fold_ln and weights is not None,
            lens=None if lens is None else lens.fingerprint,
            center_unembed=is_centred(W_U),
            precision=precision,
            repaired=readout.repaired,
            versions=_versions(),
        ),
    )


def _shuffled(x: Float[Tensor, "n d_model"], *, seed: int) -> Float[Tensor, "draw d_model"]:
    """Directions whose coordinates each come from a row of its own, drawn at random: no row's structure is left."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(x), (NULL_DRAWS, x.shape[1]), generator=generator)
    return x.gather(0, rows.to(x.device))


def _rows(readout: Readout, rows: slice) -> Readout:
    """The same readout of some of its rows."""
    return Readout(
        ids=readout.ids[:, rows],
        logits=readout.logits[:, rows],
        log_z=readout.log_z[:, rows],
        norm=readout.norm[rows],
        mean=readout.mean[rows],
        std=readout.std[rows],
        kurtosis=readout.kurtosis[rows],
        tracked=readout.tracked[rows],
        repaired=readout.repaired,
    )


def _write_z(writes: Float[Tensor, "n d_model"], ids: Tensor, unembedding: Unembedding) -> Float[Tensor, "2 n k"]:
    """Z-scores of each neuron's listed tokens in its own write direction."""
    _, n, k = ids.shape
    scores = kernel.token_scores(writes, ids.permute(1, 0, 2).reshape(n, 2 * k), unembedding)
    _, std = kernel.moments(writes, unembedding)
    return (scores / std[:, None]).reshape(n, 2, k).permute(1, 0, 2)


def _assemble(
    readouts: list[Readout],
    write_z: list[Tensor],
    draws: list[Readout] | None,
    vocab: Vocab,
    tracked: list[int],
    *,
    side: str,
    score: str,
    n_layers: int,
    layers: tuple[int, ...],
    d_model: int,
    source: Source,
) -> NeuronMap:
    def stack(name: str) -> Tensor:
        return torch.stack([getattr(readout, name) for readout in readouts])

    norm, std = stack("norm"), stack("std")
    ids, logits, log_z, writes = stack("ids"), stack("logits"), stack("log_z"), torch.stack(write_z)
    positive, negative = (
        TopTokens(
            ids=ids[:, pole].contiguous(),
            logits=logits[:, pole].contiguous(),
            log_z=log_z[:, pole].contiguous(),
            write_z=writes[:, pole].contiguous(),
            std=std,
            tau=d_model**0.5 / norm,
            vocab=vocab,
            score=score,
        )
        for pole in (0, 1)
    )
    return NeuronMap(
        side=side,
        score=score,
        n_layers=n_layers,
        layers=layers,
        d_model=d_model,
        source=source,
        vocab=vocab,
        positive=positive,
        negative=negative,
        norm=norm,
        mean=stack("mean"),
        std=std,
        kurtosis=stack("kurtosis"),
        null=None if draws is None else _null(draws),
        tracked=Tracked(tracked, stack("tracked").permute(2, 0, 1).contiguous(), vocab),
    )


def _null(draws: list[Readout]) -> Null:
    z = [(draw.logits[..., 0] / draw.std).flatten().sort().values for draw in draws]
    return Null(torch.stack(z), torch.stack([draw.kurtosis.sort().values for draw in draws]))


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for package in ("tl_flash", "torch", "transformer-lens", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
