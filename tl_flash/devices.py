"""Where to compute, and in what numbers, as a user names them."""

from __future__ import annotations

import torch

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def device_of(device: str | torch.device | None) -> torch.device | None:
    """A device that this machine has; None stands for whatever is the default.

    Raises:
        TypeError: no name.
        ValueError: there is no such device.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
    """
    if device is None:
        return None
    if not isinstance(device, str | torch.device):
        raise TypeError(f'device: expected a name such as "cpu", got {device!r}')
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # no such kind, not built for it, or fewer of them
        raise _no_device(device) from error
    if found.type == "meta":
        raise _no_device(device)
    return found


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of a model's weights, by itself or by its name.

    Raises:
        TypeError: neither.
        ValueError: no floats that a model runs in.

    Example:
        >>> dtype_of("bfloat16")
        torch.bfloat16
    """
    if not isinstance(dtype, str | torch.dtype):
        raise TypeError(f'dtype: expected a torch.dtype or a name such as "bfloat16", got {dtype!r}')
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def _no_device(device: str | torch.device) -> ValueError:
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return ValueError(f"device: expected one that this machine has ({', '.join(there)}), got {str(device)!r}")
