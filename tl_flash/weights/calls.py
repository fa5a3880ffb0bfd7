"""One forward pass written down, a call a module, and what can be told of two tensors that were seen in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SAME_DIRECTION = 1e-7


class Unreadable(ValueError):
    """Neurons that are there, but not as vectors in the residual stream."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module."""

    path: str
    module: nn.Module
    x: Tensor
    """The first tensor of numbers that it was given."""
    y: Tensor
    """The first that it answered."""
    order: int
    """How many calls ended before this one did."""
    given: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)

    @property
    def weight(self) -> Tensor:
        """Of a linear map."""
        return self.module.get_parameter("weight")

    @property
    def is_linear(self) -> bool:
        """Whether the module is a matrix, or a stack of them, under the name of weight."""
        weight = getattr(self.module, "weight", None)
        plain = not isinstance(self.module, nn.Embedding | nn.modules.conv._ConvNd) and not [*self.module.children()]
        return plain and torch.is_tensor(weight) and weight.ndim in (2, 3)


def record(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[Call], Any]:
    """Run a model once, gradients on, and write down every call in the order in which they end.

    Returns:
        The calls, and what the model answered.
    """
    calls: list[Call] = []
    handles = [
        module.register_forward_hook(partial(_write_down, calls, path), with_kwargs=True)
        for path, module in model.named_modules()
        if path
    ]
    try:
        answer = run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, answer


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """What a float64 model answers, gradients on."""
    with doubled(), torch.enable_grad():
        return model(**inputs, use_cache=False)


class _Doubling(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        func = Tensor.double if func is Tensor.float else func
        return func(*map(_wide, args), **{name: _wide(value) for name, value in (kwargs or {}).items()})


def _wide(given: Any) -> Any:
    return torch.float64 if given is torch.float32 else given


@contextmanager
def doubled() -> Iterator[None]:
    """Inside, what asks for float32, as routers and norms do whatever their model's dtype, gets float64."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with _Doubling():
            yield
    finally:
        torch.set_default_dtype(default)


def _write_down(calls: list[Call], path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    x, y = first_tensor([*args, *kwargs.values()]), first_tensor(output)
    if x is not None and y is not None and y.numel():  # an expert may be given no token
        calls.append(Call(path, module, x, y, len(calls), (args, kwargs)))
    return output.clone() if torch.is_tensor(output) else output  # some models add to an answer in place


def first_tensor(given: Any) -> Tensor | None:
    """The first tensor of numbers among what a module was given or answered."""
    if torch.is_tensor(given):
        return given if given.is_floating_point() else None
    if hasattr(given, "last_hidden_state"):
        return given.last_hidden_state
    if isinstance(given, list | tuple):
        return next((tensor for one in given if (tensor := first_tensor(one)) is not None), None)
    return None


def rows(tensor: Tensor) -> Tensor:
    """A tensor as [row, width]."""
    return tensor.reshape(-1, tensor.shape[-1])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order."""
    return a is b or (a.numel() == b.numel() and a.shape[-1] == b.shape[-1] and torch.equal(rows(a), rows(b)))


def carried(x: Tensor, y: Tensor) -> Tensor | None:
    """The factor of each row of x over the row of y of which it is a positive multiple; None if one is of none.

    So a tensor is known again that was reshaped, gathered for experts, or scaled. Rows of zeros are passed over.
    """
    if x.shape[-1] != y.shape[-1]:
        return None
    x, y = rows(x).detach().double(), rows(y).detach().double()
    x = x[x.abs().amax(-1) > 0]
    cosine, row = (nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(y, dim=-1).T).max(-1)
    if len(x) == 0 or float(cosine.min()) < 1 - _SAME_DIRECTION:
        return None
    return x.norm(dim=-1) / y[row].norm(dim=-1)


def passes(target: Tensor, source: Tensor) -> bool:
    """Whether what is in source arrives in target as it is: each coordinate in its own place, all alike."""
    return _passes(lambda column: rows(target)[:, column].sum(), source)


def _passes(entry: Callable[[int], Tensor], source: Tensor) -> bool:
    factors = []
    for column in (2, 5):
        got = entry(column)
        if not got.requires_grad or not source.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(got, source, retain_graph=True, allow_unused=True)
        if gradient is None:
            return False
        here, all = rows(gradient)[:, column], float(gradient.abs().sum())
        if not all or float(here.abs().sum()) < all * (1 - 1e-6) or bool((here < 0).any()):
            return False
        factors.append(here)
    return torch.allclose(*factors, rtol=1e-6)


def passes_beside(target: Tensor, written: Sequence[Tensor], source: Tensor) -> bool:
    """The same, of the part of target that is not what was written into it."""

    def entry(column: int) -> Tensor:
        got = rows(target)[:, column].sum()
        for one in written:
            if not got.requires_grad or not one.requires_grad:
                continue
            (gradient,) = torch.autograd.grad(got, one, retain_graph=True, allow_unused=True)
            got = got if gradient is None else got - (gradient.detach() * one).sum()
        return got

    return _passes(entry, source)


def of_linear(call: Call) -> bool | None:
    """Whether the weight of a linear map is kept [input, output]; None where it is no map by its weight alone."""
    x, y = rows(call.x).detach(), rows(call.y).detach()
    weight = call.weight.detach()
    if weight.ndim == 3:
        sizes = (x.shape[-1], y.shape[-1])
        return weight.shape[1:] == sizes if weight.shape[1:] in (sizes, sizes[::-1]) else None
    dx, dy = x - x[:1], y - y[:1]
    for transposed, W in ((False, weight.T), (True, weight)):
        if W.shape == (x.shape[-1], y.shape[-1]) and torch.allclose(dx @ W, dy, rtol=1e-6, atol=1e-8):
            return transposed
    return None
