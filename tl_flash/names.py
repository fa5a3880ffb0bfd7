"""Name one neuron, read its name back; show a model's name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple, TypeVar

_NAME = re.compile(r"L([0-9]{1,9})(?:E([0-9]{1,9}))?N([0-9]{1,9})")


class Neuron(NamedTuple):
    """One MLP neuron: its layer and its index within the layer, both from 0.

    Prints as ``L3N17``. Wherever a neuron is taken, a Neuron, a ``(layer, index)`` pair or the string
    ``"L3N17"`` will do.

    Example:
        >>> str(Neuron(3, 17))
        'L3N17'
        >>> Neuron.parse("L3N17") == (3, 17)
        True
    """

    layer: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - the field's own name

    def __str__(self) -> str:
        return f"L{self.layer}N{self.index}"

    @classmethod
    def parse(cls, name: str) -> Neuron:
        """Read ``"L3N17"``.

        Raises:
            TypeError: no string.
            ValueError: the name is not of that form, or that of an expert's neuron.
        """
        return _dense(parse(name))

    @classmethod
    def of(cls, neuron: NeuronLike) -> Neuron:
        """Take any accepted form of a neuron.

        Raises:
            TypeError: it is neither a Neuron, a pair of ints nor a string.
            ValueError: a string of another form, a negative layer or index, or a neuron of an expert.
        """
        return _dense(neuron_of(neuron))


class ExpertNeuron(NamedTuple):
    """One neuron of an expert, in a mixture of experts: layer, expert, and index within the expert, all from 0.

    Prints as ``L3E5N17``. Maps take an ExpertNeuron, a ``(layer, expert, index)`` triple or the string alike.

    Shared experts, which every token passes, are numbered on after the routed ones; one that is n times as wide as
    these counts as n experts, its neurons in their order. So of DeepSeek-V3's 257, L3E256N17 is the shared one's.

    Example:
        >>> str(ExpertNeuron(3, 5, 17))
        'L3E5N17'
    """

    layer: int
    expert: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - the field's own name

    def __str__(self) -> str:
        return f"L{self.layer}E{self.expert}N{self.index}"


AnyNeuron = Neuron | ExpertNeuron
NeuronLike = AnyNeuron | tuple[int, int] | tuple[int, int, int] | str
NeuronKey = TypeVar("NeuronKey", bound=NeuronLike)
"""The keys of a dict of neurons, whichever form they have."""


def parse(name: str) -> AnyNeuron:
    """Read ``"L3N17"`` or ``"L3E5N17"``.

    Raises:
        TypeError: no string.
        ValueError: the name is of neither form.

    Example:
        >>> parse("L3E5N17")
        ExpertNeuron(layer=3, expert=5, index=17)
    """
    if not isinstance(name, str):
        raise TypeError(f'neuron {name!r}: expected a name such as "L3N17", got {type(name).__name__}')
    match = _NAME.fullmatch(name.strip())
    if match is None:
        shown = name if len(name) <= 40 else f"{name[:40]}..."
        raise ValueError(
            f'neuron {shown!r}: expected a name such as "L3N17" (layer 3, neuron 17), or "L3E5N17" (of expert 5)'
        )
    layer, expert, index = match.groups()
    return Neuron(int(layer), int(index)) if expert is None else ExpertNeuron(int(layer), int(expert), int(index))


def neuron_of(neuron: NeuronLike) -> AnyNeuron:
    """Take any accepted form of a neuron, of a dense MLP or of an expert.

    Raises:
        TypeError: it is neither a neuron, two or three ints nor a string.
        ValueError: a string of another form, or a negative number.
    """
    if isinstance(neuron, str):
        return parse(neuron)
    if not isinstance(neuron, tuple) or len(neuron) not in (2, 3):
        raise TypeError(f'neuron {neuron!r}: expected a Neuron, a (layer, index) pair or "L3N17"')
    if any(isinstance(part, bool) or not hasattr(part, "__index__") for part in neuron):
        raise TypeError(f"neuron {neuron!r}: expected whole numbers (layer, index)")
    if any(int(part) < 0 for part in neuron):
        raise ValueError(f"neuron {neuron!r}: layer and index count from 0, negative ones name nothing")
    return Neuron(*map(int, neuron)) if len(neuron) == 2 else ExpertNeuron(*map(int, neuron))


def _dense(neuron: AnyNeuron) -> Neuron:
    if isinstance(neuron, ExpertNeuron):
        raise ValueError(
            f"neuron {neuron}: is one of a mixture of experts; expected one of a dense MLP, such as "
            f"{Neuron(neuron.layer, neuron.index)}"
        )
    return neuron


def shown_model(name: str) -> str:
    """A model's name as it is shown; of one that lies on a disk, without the folders that it lies in."""
    own = Path(name).name
    return own if own and (os.path.isabs(name) or os.path.exists(name)) else name  # which takes a name of any length
