"""Decode any directions of the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash import kernel
from tl_flash.decode.assembly import assemble, divisor, is_centred, rows_of, versions, with_lengths, z_of
from tl_flash.decode.null import null_of, shuffled_rows, to_decode
from tl_flash.devices import device_of
from tl_flash.kernel import Readout
from tl_flash.lens import JacobianLens, lens_of
from tl_flash.maps import NeuronMap, Null, Source, while_unchanged
from tl_flash.vocab import Vocab
from tl_flash.weights import UnembeddingWeights, fingerprint, read, read_unembedding

_FEWEST_TO_SHUFFLE = 32
_MANY = 1024
"""Directions beside which a null and W_U's fingerprint take little; of fewer they are made when first asked for."""


def decode_directions(
    directions: Float[Tensor, "n d_model"] | Float[Tensor, " d_model"] | Float[np.ndarray, "n d_model"],
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
            the model is one); a tensor or a numpy array. One direction [d_model] will do; directions that lie in
            columns, [d_model, n], are turned where only so they fit.
        model_or_W_U: a model as `flash_decode` takes it, whose final norm's scale is folded in and whose MLPs are not
            looked at; or an unembedding [d_model, d_vocab] that is used as it is, or an lm_head.weight
            [d_vocab, d_model] where only so the directions fit.
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
        From 32 directions on it has a null, which shuffles each coordinate over the directions given. Of fewer than
        1,024 the null and `source.fingerprint` are made when first asked for: until then the map holds W_U.

    Raises:
        TypeError: directions that are no floats, or no model.
        ValueError: as in `flash_decode`; or directions that are none, not finite, or fit neither way round.

    Example:
        >>> dictionary = torch.randn(100, model.cfg.d_model)
        >>> decode_directions(dictionary, model, k=3).positive.ids.shape
        torch.Size([1, 100, 3])
    """
    device_of(device)
    rows = _floats(directions, "directions")
    if isinstance(model_or_W_U, Tensor | np.ndarray):
        weights, fold_ln = None, False
        rows, W_U = _fitting(rows, _floats(model_or_W_U, "model_or_W_U"))
        unread = _bare(W_U, Vocab.of_tokenizer(tokenizer, W_U.shape[1]))
    else:
        weights = None if lens is None else read(model_or_W_U, tokenizer=tokenizer)
        unread = read_unembedding(model_or_W_U, tokenizer=tokenizer) if weights is None else weights
        rows = _in_rows(rows, unread.d_model)
    if len(rows) == 0:
        raise ValueError("directions: expected at least one row, got none")
    carried = rows
    if lens is not None or layer is not None:
        if lens is None or layer is None or weights is None or not fold_ln:
            raise ValueError(
                "lens: expected a lens, its layer, a model and fold_ln=True together, got only some of them"
            )
        lens = lens_of(model_or_W_U, lens, layers=[layer])
        lens.require_model(weights)
        carried = lens.carry(carried, layer)
    vocab, final_norm = unread.vocab, unread.final_norm
    tracked = vocab.ids(tokens or [])
    n = len(carried)
    few, null = n < _MANY, n >= _FEWEST_TO_SHUFFLE
    unembedding = kernel.prepare(
        unread.W_U,
        gain=unread.final_gain if fold_ln else None,
        centre=unread.centre and fold_ln,
        score=score,
        ignore=vocab.nameless() + vocab.ids(ignore_tokens or []),
        device=device,
        precision=precision,
        keep=not few,
    )

    def decoded(x: Tensor) -> Readout:
        norm = divisor(x, centred=unread.centre and not fold_ln, final_norm=final_norm)
        return kernel.decode(x, unembedding, k=k, tracked=tracked, norm=norm, max_bytes=max_bytes)

    def shuffled() -> Tensor:
        draws = carried.gather(0, shuffled_rows(n, carried.shape[1], seed=0).to(carried.device).long())
        return to_decode(draws, unembedding)

    if few:
        rows, carried = rows.clone(), carried.clone()  # what is made later is made of them
        readout, draws = decoded(carried), None
    else:
        both = decoded(torch.cat([carried, shuffled()]))
        readout, draws = rows_of(both, slice(n)), rows_of(both, slice(n, None))
    if not final_norm:
        readout = with_lengths(readout, carried)
    names = ("ids", "logits", "log_z", "norm", "mean", "std", "kurtosis", "tracked")
    tensors = {name: getattr(readout, name) for name in names}
    tensors["write_z"] = z_of(readout)
    W_U, later = unread.W_U, few and not unread.W_U.is_inference()
    make_null = cache(lambda: null_of(decoded(shuffled()) if draws is None else draws))
    make_fingerprint: Callable[[], str] = lambda: fingerprint(W_U.T, rows)  # noqa: E731
    if later:
        make_null = while_unchanged(make_null, W_U, "null")
        make_fingerprint = while_unchanged(make_fingerprint, W_U, "fingerprint")
    z, kurtosis = (lambda: make_null()["null.z"][None], lambda: make_null()["null.kurtosis"][None])
    return assemble(
        {name: tensor[None] for name, tensor in tensors.items()},
        (Null(cast(Tensor, z), cast(Tensor, kurtosis)) if later else Null(z(), kurtosis())) if null else None,
        tracked,
        vocab,
        side="direction",
        score=score,
        n_layers=1,
        layers=(0,),
        n_experts=None,
        d_model=carried.shape[1],
        source=Source(
            model=unread.name,
            model_class=unread.class_name,
            fingerprint=cast(str, make_fingerprint) if later else make_fingerprint(),
            dtype=str(rows.dtype).removeprefix("torch."),
            fold_ln=fold_ln,
            lens=None if lens is None else lens.fingerprint,
            lens_made=None if lens is None else lens.source.made,
            center_unembed=is_centred(unembedding),
            precision=precision,
            repaired=readout.repaired,
            versions=versions(),
            final_norm=final_norm,
        ),
    )


def _floats(given: Any, name: str) -> Tensor:
    """A tensor of floats.

    Raises:
        TypeError: it is none.
    """
    if isinstance(given, np.ndarray) and given.dtype.kind == "f":
        given = torch.from_numpy(given.astype(given.dtype.newbyteorder("=")))
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = getattr(given, "dtype", type(given).__name__)
        raise TypeError(f"{name}: expected a tensor or numpy array of floats, got {kind}; convert it first")
    if not 1 <= given.ndim <= 2:
        expected = "[n, d_model] or [d_model]" if name == "directions" else "[d_model, d_vocab]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(given.shape)}")
    return given.detach()


def _in_rows(directions: Tensor, d_model: int) -> Float[Tensor, "n d_model"]:
    """Directions in rows, whichever way they lie.

    Raises:
        ValueError: neither way fits.
    """
    if directions.shape[-1] == d_model:
        return torch.atleast_2d(directions)
    if directions.shape[0] == d_model:
        return directions.T
    raise ValueError(
        f"directions: expected shape [n, {d_model}], a direction a row, or [{d_model}, n], a direction a column, got "
        f"{list(directions.shape)}"
    )


def _fitting(directions: Tensor, W_U: Tensor) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "d_model d_vocab"]]:
    """Directions in rows and the unembedding [d_model, d_vocab], as given or the only other way in which they fit.

    Raises:
        ValueError: no way fits, or several and not the one documented.
    """
    if W_U.ndim != 2:
        raise ValueError(f"model_or_W_U: expected an unembedding [d_model, d_vocab], got {list(W_U.shape)}")
    rows = torch.atleast_2d(directions)
    ways = [(x, W) for W in (W_U, W_U.T) for x in (rows, rows.T)[: directions.ndim] if x.shape[1] == len(W)]
    if not ways or (len(ways) > 1 and rows.shape[1] != len(W_U)):
        found = "in more than one way" if ways else "in no way"
        raise ValueError(
            f"directions: {list(directions.shape)} and an unembedding {list(W_U.shape)} fit {found}; expected "
            "directions [n, d_model], a direction a row, and W_U [d_model, d_vocab], which is lm_head.weight.T"
        )
    return ways[0]


def _bare(W_U: Tensor, vocab: Vocab) -> UnembeddingWeights:
    """An unembedding that is no model's."""
    return UnembeddingWeights(
        d_model=len(W_U), W_U=W_U, final_gain=None, centre=False, vocab=vocab, name="unembedding", class_name="Tensor"
    )
