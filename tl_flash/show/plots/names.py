"""How a figure names models, readings and neurons."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from tl_flash.maps import Origin, Source
from tl_flash.names import AnyNeuron, shown_model


def model_of(source: Source) -> str:
    """Its name, without the folders that it lies in."""
    return escape(shown_model(source.model))


def reading_of(origin: Origin) -> str:
    """The model and what of its neurons is read."""
    return f"{model_of(origin.source)}, {origin.reading}"


def named(neurons: Iterable[AnyNeuron], *, experts: bool) -> tuple[str, dict[str, Any]]:
    """The hover template of a trace's neurons' names, and what the trace needs for it.

    A dense neuron's name is put together from customdata, whose first two columns are its layer and index; one of a
    mixture of experts comes as text.
    """
    if not experts:
        return "<b>L%{customdata[0]}N%{customdata[1]}</b>", {}
    return "<b>%{hovertext}</b>", {"hovertext": [str(neuron) for neuron in neurons]}
