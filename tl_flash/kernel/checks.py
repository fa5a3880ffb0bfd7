"""Refusals of the engine: each names the argument, what was expected, what was given and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def expect_one_of(name: str, given: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless `given` is one of `known`."""
    if given not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {given!r}")


def expect_float(name: str, given: Tensor) -> None:
    """Raise TypeError unless `given` is a tensor of real floats."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(given).__name__}; wrap it in torch.as_tensor")
    if not given.is_floating_point():
        raise TypeError(f"{name}: expected a float dtype, got {given.dtype}; convert it with .float()")


def expect_matrix(name: str, given: Tensor, shape: str, width: int | None = None) -> None:
    """Raise unless `given` is a float matrix, `width` wide where one is given."""
    expect_float(name, given)
    if given.ndim != 2 or width not in (None, given.shape[1]):
        raise ValueError(f"{name}: expected shape {shape}, got {list(given.shape)}")


def token_ids(name: str, given: Sequence[int] | Tensor | None, d_vocab: int) -> Tensor:
    """Take ids as int64 on the CPU.

    Raises:
        TypeError: they are not whole numbers.
        ValueError: they are not a flat sequence, or one is out of range.
    """
    ids = torch.as_tensor([] if given is None else given).cpu()
    if ids.numel() == 0:
        return ids.long().flatten()
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: expected token ids, whole numbers, got {ids.dtype}; look tokens up first")
    if ids.ndim != 1:
        raise ValueError(f"{name}: expected a flat sequence of token ids, got shape {list(ids.shape)}")
    outside = ids[(ids < 0) | (ids >= d_vocab)]
    if len(outside):
        raise ValueError(f"{name}: expected token ids from 0 to {d_vocab - 1}, got {int(outside[0])}")
    return ids.long()


def expect_count(k: int, n_reportable: int) -> None:
    """Raise unless that many tokens can be named."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected a whole number of tokens, got {type(k).__name__}")
    if not 1 <= k <= n_reportable:
        raise ValueError(f"k: expected 1 to {n_reportable}, the number of tokens not ignored, got {k}")


def expect_finite(finite: Tensor) -> None:
    """Raise ValueError unless every row is, bool [n]."""
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"x: expected finite directions, got NaN or infinity in row {row}; mend or leave out that row")


def expect_in_range(out: dict[str, Tensor]) -> None:
    """Raise ValueError unless logits [2, n, k], log_z [2, n] and std [n] are within float32."""
    beyond = out["logits"].isinf().any(-1).any(0) | out["log_z"].isinf().any(0) | out["std"].isinf()
    if beyond.any():
        row = int(beyond.nonzero()[0])
        raise ValueError(f"x: expected logits within float32, got infinite ones in row {row}; scale x or norm")


def expect_bytes(max_bytes: int) -> None:
    """Raise TypeError unless `max_bytes` is a whole number."""
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes: expected a whole number of bytes, got {type(max_bytes).__name__}")


def expect_norm(norm: Tensor, n: int) -> None:
    """Raise unless `norm` holds n lengths."""
    expect_float("norm", norm)
    if norm.shape != (n,):
        raise ValueError(f"norm: expected shape [{n}], a length for each direction, got {list(norm.shape)}")
    wrong = ~((norm >= 0) & torch.isfinite(norm))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"norm: expected finite lengths from 0, got {float(norm[row])} in row {row}")
