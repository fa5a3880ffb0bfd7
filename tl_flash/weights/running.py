"""How a model is run to be measured: in eval mode, without gradients, and left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """Put a model in eval mode inside the context, where nothing takes gradients; dropout would make noise of answers.

    Every module, also those of the Hugging Face model behind a bridge, gets the mode back that it had.

    Args:
        model: a HookedTransformer, a TransformerBridge, or any module.

    Example:
        >>> from tl_flash.weights import measuring
        >>> with measuring(model):
        ...     model("One day,").requires_grad
        False
    """
    training = [module for module in _modules(model) if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def differentiating(model: Any) -> Iterator[None]:
    """`measuring`, where gradients are taken all the same.

    Modules that keep what they computed, as a bridge's attention keeps its pattern, are left with the values alone: a
    model that holds a graph can be neither copied nor freed of it.
    """
    with measuring(model):
        try:
            with torch.enable_grad():
                yield
        finally:
            for module in _modules(model):
                for name, kept in vars(module).items():
                    if isinstance(kept, torch.Tensor) and kept.grad_fn is not None:
                        setattr(module, name, kept.detach())


def _modules(model: Any) -> list[torch.nn.Module]:
    """All of a model's, also those of the Hugging Face model behind a bridge."""
    wrapped = getattr(model, "original_model", None)
    return [*model.modules(), *(wrapped.modules() if isinstance(wrapped, torch.nn.Module) else ())]
