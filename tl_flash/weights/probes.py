"""Does a module do what its weight says? Adapters, masks and parametrisations make one that does something else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tl_flash.weights.running import measuring

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

_COLUMNS = 4096  # of a weight that are compared at a time


def require_readable(tensor: Tensor, what: str) -> Tensor:
    """Return a tensor that holds its numbers here, as floats.

    Raises:
        ValueError: it is sharded, not loaded, or quantised; the message says what to do.
    """
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{what}: sharded over processes (DTensor), so this one holds a part; gather each parameter with "
            ".full_tensor() and load them into a model that is not sharded"
        )
    if tensor.is_meta:
        raise ValueError(
            f"{what}: on the meta device, so its numbers are not in memory (offloaded, or never loaded); load the "
            'model whole, without device_map="auto", or give its checkpoint folder instead'
        )
    if tensor.dtype not in _TOLERANCE:
        raise ValueError(
            f"{what}: expected floating-point weights, got {tensor.dtype} (quantised?); load the unquantised model, "
            "or give its folder"
        )
    return tensor


def require_plain(owner: nn.Module, matrices: Iterable[Tensor], what: str) -> None:
    """Refuse matrices that the modules holding them do not multiply by.

    Args:
        owner: has these modules somewhere below it.
        matrices: views of their weights.
        what: the owner's name, for the message.

    Raises:
        ValueError: one gives something else; the message names the module.
    """
    modules = [(name, m) for name, m in owner.named_modules() if not hasattr(m, "original_component")]  # no hooks run
    for name, module in modules:
        if isinstance(getattr(module, "base_layer", None), nn.Module) and not _acts_as_base(module):
            _refuse(module, f"{what}.{name}")
    for matrix in matrices:
        holder = next((pair for pair in modules if _holds(pair[1], matrix)), None)
        if holder is not None:
            require_linear(holder[1], f"{what}.{holder[0]}")


def require_linear(module: nn.Module, what: str) -> None:
    """Refuse a module that does not multiply by its weight.

    Raises:
        ValueError: it gives something else.
    """
    held = getattr(module, "weight", None)
    if not torch.is_tensor(held):
        raise ValueError(
            f"{what}: a {type(module).__name__} that holds no weight (quantised, or was the module replaced?); "
            "load the unquantised model, or put the module back"
        )
    weight = require_readable(held, what)
    stored = weight if type(module).__name__ == "Conv1D" else weight.T  # [input, output]
    x = _inputs(stored.shape[0], weight)
    with measuring(module), torch.autocast(weight.device.type, enabled=False):
        given = module(x) - module(torch.zeros_like(x))  # without bias
        if given.shape != (len(x), stored.shape[1]):
            _refuse(module, what)
        for columns in range(0, stored.shape[1], _COLUMNS):
            some = slice(columns, columns + _COLUMNS)
            expected = x.to(_wide(weight)) @ stored[:, some].detach().to(_wide(weight))
            finite = expected.isfinite().all(0)  # what is not is refused elsewhere
            off = given[:, some].to(_wide(weight)) - expected
            if not off[:, finite].norm() <= _TOLERANCE[weight.dtype] * expected[:, finite].norm():
                _refuse(module, what)


def require_norm(module: nn.Module, gain: Tensor, centre: bool, what: str) -> None:
    """Refuse a module that does not normalise and scale as this gain says.

    Raises:
        ValueError: it gives something else.
    """
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    given = 64 * (torch.randn(1, 3, len(gain), generator=torch.Generator().manual_seed(0)) + 1)
    x = given.to(gain.device, dtype)
    with measuring(module), torch.autocast(gain.device.type, enabled=False):
        odd = (module(x) - module(-x)) / 2  # without bias
    expected = gain.double() * unit(x.double(), centre)
    finite = expected.isfinite()  # what is not is refused elsewhere
    off = odd.double() - expected if odd.shape == x.shape else expected
    if not off[finite].norm() <= _TOLERANCE[dtype] * expected[finite].norm():
        kind = "LayerNorm" if centre else "RMSNorm"
        raise ValueError(
            f"{what}: a {type(module).__name__} that is not the {kind} by its weight which models of this class have; "
            "expected the model as its class makes it (was the module replaced?)"
        )


def unit(x: Tensor, centre: bool) -> Tensor:
    """Rows normalised plainly, with no gain: root mean square 1 (LayerNorm: of the centred row)."""
    x = x - x.mean(-1, keepdim=True) if centre else x
    return x / x.square().mean(-1, keepdim=True).sqrt()


class HeldTensors(Mapping[str, Tensor]):
    """A Hugging Face model's tensors by name, each as its module uses it: masked where pruned, computed where
    parametrised; a matrix that its module does not multiply by is refused, and a norm that is another than expected.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._probed = model, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        module = self._module(path)
        held = getattr(module, leaf, None)
        if module is not None and leaf == "weight" and getattr(held, "ndim", 2) == 2 and name not in self._probed:
            require_linear(module, path)
            self._probed.add(name)
        if not torch.is_tensor(held):
            raise ValueError(
                f"model: {name} is missing, which models of its class have; expected the model as its class makes it "
                "(was a module replaced?)"
            )
        return getattr(module, leaf).detach()  # anew: a pruned module makes it when it runs

    def require_norm(self, name: str, gain: Tensor, centre: bool) -> None:
        """Refuse a norm, by the name of its weight, that does something else than this."""
        path, _, leaf = name.rpartition(".")
        module = self._module(path)
        if module is not None and name not in self._probed:
            require_readable(getattr(module, leaf), path)
            require_norm(module, gain, centre, path)
            self._probed.add(name)

    def __contains__(self, name: object) -> bool:
        path, _, leaf = str(name).rpartition(".")
        return torch.is_tensor(getattr(self._module(path), leaf, None))

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._model.named_parameters(remove_duplicate=False))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _module(self, path: str) -> nn.Module | None:
        module: Any = self._model
        for part in path.split(".") if path else ():
            module = getattr(module, part, None)
        return module


def _inputs(width: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, width, generator=generator, dtype=torch.float32).to(like)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _acts_as_base(module: Any) -> bool:
    """Whether an adapter changes nothing: not trained yet, switched off, or merged into its base layer."""
    base = module.base_layer
    if not torch.is_tensor(getattr(base, "weight", None)) or not base.weight.is_floating_point():
        return False
    x = _inputs(base.weight.shape[0 if type(base).__name__ == "Conv1D" else 1], base.weight)
    with measuring(module):
        return torch.equal(module(x), base(x))


def _holds(module: nn.Module, matrix: Tensor) -> bool:
    weight = getattr(module, "weight", None)
    return (
        torch.is_tensor(weight)
        and weight.ndim == 2
        and not weight.is_meta
        and weight.data_ptr() == matrix.data_ptr()
        and sorted(weight.shape) == sorted(matrix.shape)
    )


def _refuse(module: nn.Module, what: str) -> None:
    raise ValueError(
        f"{what}: a {type(module).__name__} that does not multiply by the weight it holds (an adapter such as LoRA?), "
        "so the model runs another; merge it first, with PEFT's model.merge_and_unload()"
    )
