"""The MLP weights of a model, whatever holds it: one layer at a time, as directions in the residual stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.vocab import Vocab

SIDES = ("in", "gate", "out")
_MATRIX = {"in": "W_in", "gate": "W_gate", "out": "W_out"}


@dataclass(frozen=True)
class Layer:
    """One layer's MLP as the model holds it, a neuron a row; views, never copies."""

    W_in: Float[Tensor, "d_mlp d_model"]
    W_out: Float[Tensor, "d_mlp d_model"]
    W_gate: Float[Tensor, "d_mlp d_model"] | None = None
    gain_pre: Float[Tensor, " d_model"] | None = None
    """Scale of the norm before the MLP, None where there is none or it is folded in already."""
    gain_post: Float[Tensor, " d_model"] | None = None
    """Scale of a norm after the MLP (Gemma 2 and 3, OLMo 2)."""


@dataclass(frozen=True)
class MLPWeights:
    """What the decode needs of a model.

    `W_U` is as the model holds it. The directions and `final_gain` carry all folding: the scores of a direction x are
    ``(final_gain * x) @ W_U``, equal to ``x @ W_U'`` for the folded unembedding (LayerNorm's centring of W_U' over
    d_model changes nothing for a centred x).
    """

    n_layers: int
    d_mlp: int
    d_model: int
    centre: bool
    """Whether the norms are LayerNorm, which centres, and not RMSNorm."""
    W_U: Float[Tensor, "d_model d_vocab"]
    final_gain: Float[Tensor, " d_model"] | None
    read_layer: Callable[[int], Layer] = field(repr=False)
    sides: tuple[str, ...]
    vocab: Vocab = field(repr=False)
    name: str
    class_name: str

    @property
    def d_vocab(self) -> int:
        """Number of columns of W_U."""
        return self.W_U.shape[1]

    @property
    def dtype(self) -> str:
        """In which the model holds its unembedding, such as "bfloat16"."""
        return str(self.W_U.dtype).removeprefix("torch.")

    def layer(self, layer: int) -> Layer:
        """One layer's matrices.

        Raises:
            ValueError: the layer is unknown, or its width differs from the first one's.
        """
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layers: expected layers from 0 to {self.n_layers - 1}, got {layer}")
        read = self.read_layer(layer)
        if read.W_in.shape != (self.d_mlp, self.d_model):
            raise ValueError(
                f"layer {layer}: W_in is {tuple(read.W_in.shape)}, expected ({self.d_mlp}, {self.d_model}) as in the "
                "first layer; decode layers of one width at a time with layers="
            )
        return read

    def directions(self, layer: int, side: str, *, fold_ln: bool = True) -> Float[Tensor, "d_mlp d_model"]:
        """The directions of one layer's neurons on one side, float32, in the basis of the residual stream.

        Folded, the read sides carry the gain of the norm before the MLP and the write side that of a norm after it,
        and LayerNorm centres; so a model gives the same directions however it was loaded. Unfolded, the weights are
        read as the model holds them.

        Raises:
            ValueError: an unknown layer or side, no gate in this model, or a NaN or infinite weight.
        """
        require_side(side, self.sides)
        read = self.layer(layer)
        matrix: Tensor = getattr(read, _MATRIX[side])
        x = require_finite(matrix.detach().float(), f"layer {layer}: {_MATRIX[side]}")
        if not fold_ln:
            return x
        gain = read.gain_post if side == "out" else read.gain_pre
        if gain is not None:
            x = x * require_finite(gain.detach().float(), f"layer {layer}: the norm's scale").to(x.device)
        return x - x.mean(-1, keepdim=True) if self.centre else x

    def fingerprint(self, layers: Sequence[int], side: str) -> str:
        """The digest of W_U and of one side of these layers, as held."""
        return fingerprint(self.W_U.T, *(getattr(self.layer(layer), _MATRIX[side]) for layer in layers))


def is_centred(W_U: Float[Tensor, "d_model d_vocab"]) -> bool:
    """Whether the columns of W_U have mean zero, as TransformerLens's `center_unembed` leaves them."""
    mean = W_U.detach().mean(1, dtype=torch.float32).norm()
    length = W_U.detach().norm(dtype=torch.float32) / W_U.shape[1] ** 0.5
    return bool(mean <= 1e-4 * length)


def require_side(side: str, sides: Sequence[str]) -> None:
    """Refuse a side that does not exist, or that this model lacks."""
    if side not in SIDES:
        raise ValueError(f'side: expected "in", "gate" or "out", got {side!r}')
    if side not in sides:
        raise ValueError('side: "gate" needs a gated MLP, and this model\'s MLP has none; use "in" or "out"')


def require_finite(tensor: Tensor, what: str) -> Tensor:
    """Return a tensor that holds no NaN and no infinity.

    Raises:
        ValueError: it holds one; the message says how many and where the first is.
    """
    finite = torch.isfinite(tensor)
    if not finite.all():
        first = tuple(int(i) for i in (~finite).nonzero()[0])
        count = int((~finite).sum())
        raise ValueError(
            f"{what} holds {count} NaN or infinite values, the first at {first} (neuron or row first); "
            "expected finite weights: check how the model was loaded or trained"
        )
    return tensor


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(*matrices: Tensor) -> str:
    """A digest of the values of matrices, the same for every memory layout and device.

    Every element counts, with its place: a matrix enters by its shape, its dtype and the exact integer sums of its bit
    patterns along both axes, those of the columns weighted by row. (It tells models apart; it is no signature.)
    """
    digest = hashlib.sha256()
    for matrix in matrices:
        digest.update(f"{tuple(matrix.shape)} {matrix.dtype}".encode())
        bits = matrix.detach().view(_BITS[matrix.element_size()])
        columns = torch.zeros(matrix.shape[1], dtype=torch.int64, device=matrix.device)
        rows = max(1, 2**22 // matrix.shape[1])  # a block at a time: int64 sums of a whole W_U would be large
        for start in range(0, len(bits), rows):
            block = bits[start : start + rows].to(torch.int64)
            weight = torch.arange(start + 1, start + 1 + len(block), device=matrix.device)
            columns += (block * weight[:, None]).sum(0)
            digest.update(block.sum(1).cpu().numpy().tobytes())
        digest.update(columns.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
