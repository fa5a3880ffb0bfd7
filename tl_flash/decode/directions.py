"""Decode any directions of the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor

from tl_flash import kernel
from tl_flash.decode.assembly import assemble, null_of, rows_of, shuffled_rows, versions
from tl_flash.lens import JacobianLens, lens_of
from tl_flash.maps import NeuronMap, Source
from tl_flash.vocab import Vocab
from tl_flash.weights import fingerprint, is_centred, read

_FEWEST_TO_SHUFFLE = 32


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
    lens: JacobianLens | Literal["auto"] | None = None,
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
        lens: carries the directions through the rest of the model, as in `flash_decode`, "auto" included.
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
        weights = read(model_or_W_U, tokenizer=tokenizer)
        W_U, vocab, name, class_name = weights.W_U, weights.vocab, weights.name, weights.class_name
        gain, centre = (weights.final_gain, weights.centre) if fold_ln else (None, False)
    carried = directions.detach()
    if lens is not None or layer is not None:
        if lens is None or layer is None or weights is None or not fold_ln:
            raise ValueError(
                "lens: expected a lens, its layer, a model and fold_ln=True together, got only some of them"
            )
        lens = lens_of(model_or_W_U, lens, layers=[layer])
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
            lens_made=None if lens is None else lens.source.made,
            center_unembed=is_centred(W_U),
            precision=precision,
            repaired=readout.repaired,
            versions=versions(),
        ),
    )
