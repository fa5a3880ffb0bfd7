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
    wrapped = getattr(model, "original_model", None)
    modules = [*model.modules(), *(wrapped.modules() if isinstance(wrapped, torch.nn.Module) else ())]
    modes = {module: module.training for module in modules}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
