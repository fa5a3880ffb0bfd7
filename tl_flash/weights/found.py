"""Layouts by class and config: traced once, on a tiny model of the same kinds of layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from tl_flash.weights.calls import Unreadable
from tl_flash.weights.layouts import Layout
from tl_flash.weights.naming import saved_layout
from tl_flash.weights.places import Shape
from tl_flash.weights.tiny import WIDER, randomised, tiny_config, tiny_model, token_ids
from tl_flash.weights.tracing import trace

_SMALL = 2_000_000
"""Parameters up to which a copy of a model itself is traced, where its class cannot be made tiny."""
_IDLE = ("architectures", "dtype", "torch_dtype", "_name_or_path", "transformers_version")
_FOUND: dict[tuple[type, str], Found] = {}
_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)


class NotTraced(ValueError):
    """No model of a class could be made small and run."""


@dataclass(frozen=True)
class Found:
    """What was found of a class and config."""

    model_class: type
    config: Any
    layout: Layout
    """By the names of a model's parameters."""
    tiny: Any
    """What it was traced on."""

    @cached_property
    def saved(self) -> Layout:
        """The same by the names of saved tensors.

        Raises:
            ValueError: they are saved in a form that is not understood.
        """
        with _no_bars():
            return saved_layout(self.layout, self.tiny)

    @cached_property
    def skeleton(self) -> nn.Module:
        """A model of the real config without memory for its weights."""
        with torch.device("meta"):
            return self.model_class(copy.deepcopy(self.config))

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of the real model's parameters."""
        named = self.skeleton.named_parameters(remove_duplicate=False)
        return {name: tuple(parameter.shape) for name, parameter in named}


def class_of(model: nn.Module) -> type:
    """A Hugging Face model's own class; FSDP2 makes another of it."""
    return next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))


def found_of(model: Any, *, wrapped: bool = False) -> Found:
    """What was found of a Hugging Face model's class and config; see `found`.

    Args:
        model: the model.
        wrapped: a bridge has changed its modules, so that it cannot be traced itself.
    """
    return found(class_of(model), model.config, None if wrapped else model)


def found(model_class: type, config: Any, model: nn.Module | None = None) -> Found:
    """The layout of a class of models, for a config.

    Args:
        model_class: a Hugging Face class.
        config: of the real model; sizes apart, the layout holds for all models of it.
        model: the model itself where there is one: where none of its class can be made small, and it is small, a copy
            of it is traced.

    Raises:
        NotTraced: no tiny model of it can be made and run.
        ValueError: what it does is not understood.
    """
    key = (model_class, _shape_of(config))
    if key not in _FOUND:
        try:
            _FOUND[key] = _of_class(model_class, config)
        except NotTraced:
            if model is None or sum(parameter.numel() for parameter in model.parameters()) > _SMALL:
                raise
            return _of_model(model, config)  # of this one alone, whatever was changed in it
    return _FOUND[key]


def _shape_of(config: Any) -> str:
    """What tells configs apart, without what says nothing of a layout."""
    return json.dumps({name: value for name, value in config.to_dict().items() if name not in _IDLE}, default=str)


def _of_class(model_class: type, config: Any) -> Found:
    with _told(model_class):
        tiny = tiny_model(model_class, tiny_config(config))
        layout = _traced(tiny)
        if layout.scale != 1:
            layout = _with_power(layout, _traced(tiny_model(model_class, tiny_config(config, wider=WIDER))))
    return Found(model_class, config, layout, tiny)


def _of_model(model: nn.Module, config: Any) -> Found:
    with _told(type(model)):
        tiny = randomised(copy.deepcopy(model))
        return Found(type(model), config, _traced(tiny), tiny)


@contextmanager
def _told(model_class: type) -> Iterator[None]:
    """Say which class could not be traced, or not be read, and why."""
    name = model_class.__name__
    try:
        yield
    except Unreadable as fault:
        raise ValueError(f"{name}: {fault}, so its neurons have no reading through the unembedding") from fault
    except _FAULTS as fault:  # whatever a class of models raises when it is made small and run
        raise NotTraced(
            f"{name}: its layout was not found ({fault}); expected a causal language model that reads token ids alone, "
            "whose layers follow one another and end in a norm and a linear map"
        ) from fault


def _traced(model: Any) -> Layout:
    if model.get_output_embeddings() is None:
        raise Unreadable("it has no unembedding (a classifier's head answers no tokens)")
    ids = token_ids()
    return trace(model, input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))


def _with_power(layout: Layout, wider: Layout) -> Layout:
    """A layout whose scale goes with a power of d_model, told by a wider one."""
    power = round(2 * log(wider.scale / layout.scale, WIDER)) / 2
    return replace(layout, scale=layout.scale / layout.d_model**power, scale_power=power)


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
