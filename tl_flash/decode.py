"""Where weights, kernel and map meet: decode every neuron of a model, or any directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor

from tl_flash import checkpoint, kernel, models
from tl_flash.assembly import assemble, null_of, rows_of, shuffled_rows, versions
from tl_flash.lens import JacobianLens
from tl_flash.neuron_map import NeuronMap, Source
from tl_flash.progress import track
from tl_flash.vocab import Vocab
from tl_flash.weights import MLPWeights, fingerprint, is_centred, require_side
from tl_flash.work import Job

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
        model: a HookedTransformer or subclass, a TransformerBridge (with or without compatibility mode), a Hugging
            Face causal LM, or a checkpoint by its folder or its name on the hub, which is read a piece of a layer at a
            time without building the model (`tl_flash.checkpoint`).
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
        FileNotFoundError: no such checkpoint, or a file of it is missing.
        ValueError: an unknown side, score, precision, layer or token, no layers, a k below 1 or above what can be
            reported, a layer whose neurons cannot be read, layers of several widths, NaN or infinite weights, a
            broken checkpoint, or a lens of another model, without a layer asked for, or with `fold_ln=False`.

    Example:
        >>> neurons = flash_decode(model, k=3)
        >>> neurons.positive.ids.shape == (model.cfg.n_layers, neurons.d_mlp, 3)
        True
        >>> neurons["L0N5"].positive[0].token == neurons.positive.strings[0, 5, 0]
        True
    """
    job = plan(
        model,
        side=side,
        score=score,
        k=k,
        layers=layers,
        fold_ln=fold_ln,
        tokens=tokens,
        ignore_tokens=ignore_tokens,
        lens=lens,
        precision=precision,
        device=device,
        max_bytes=max_bytes,
        tokenizer=tokenizer,
    )
    return job.assemble(track(job.run(job.units), f'decoding "{side}"', progress, total=len(job.units)))


def plan(
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
    tokenizer: Any = None,
) -> Job:
    """The work of `flash_decode`, checked but not begun; same arguments."""
    weights = _read(model, tokenizer)
    chosen = models.chosen_layers(layers, weights.n_layers)
    require_side(side, weights.sides)
    if lens is not None:
        lens.require_model(weights)
        if not fold_ln:
            raise ValueError("lens: it reads folded weights; expected fold_ln=True beside it, got False")
    return Job(
        weights=weights,
        layers=tuple(chosen),
        side=side,
        score=score,
        k=k,
        fold_ln=fold_ln,
        tracked=weights.vocab.ids(tokens or []),
        ignored=weights.vocab.nameless() + weights.vocab.ids(ignore_tokens or []),
        lens=lens,
        precision=precision,
        device=None if device is None else torch.device(device),
        max_bytes=max_bytes,
    )


def _read(model: Any, tokenizer: Any) -> MLPWeights:
    if isinstance(model, str | Path):
        return checkpoint.read(model, tokenizer=tokenizer)
    return models.read(model, tokenizer=tokenizer)


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
        weights = _read(model_or_W_U, tokenizer)
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
    n = len(carried)
    rows, null = carried, n >= _FEWEST_TO_SHUFFLE
    if null:
        drawn = shuffled_rows(n, carried.shape[1], seed=0).to(carried.device)
        rows = torch.cat([carried, carried.gather(0, drawn)])
    both = kernel.decode(rows, unembedding, k=k, tracked=tracked, max_bytes=max_bytes)
    readout = rows_of(both, slice(n))
    signs = torch.tensor([1.0, -1.0])[:, None, None]
    names = ("ids", "logits", "log_z", "norm", "mean", "std", "kurtosis", "tracked")
    tensors = {name: getattr(readout, name) for name in names}
    tensors["write_z"] = signs * readout.logits / readout.std[:, None]
    if null:
        tensors |= null_of(rows_of(both, slice(n, None)))
    return assemble(
        {name: tensor[None] for name, tensor in tensors.items()},
        tracked,
        vocab,
        side="direction",
        score=score,
        n_layers=1,
        layers=(0,),
        n_experts=None,
        d_model=carried.shape[1],
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
            versions=versions(),
        ),
    )
