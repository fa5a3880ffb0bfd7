"""Name one neuron, read its name back, group names by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_NAME = re.compile(r"L(\d+)N(\d+)")


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
            ValueError: the name is not of that form.
        """
        match = _NAME.fullmatch(name.strip())
        if match is None:
            raise ValueError(f'neuron {name!r}: expected a name such as "L3N17" (layer 3, neuron 17)')
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, neuron: NeuronLike) -> Neuron:
        """Take any accepted form of a neuron.

        Raises:
            TypeError: it is neither a Neuron, a pair of ints nor a string.
            ValueError: a string of another form, or a negative layer or index.
        """
        if isinstance(neuron, str):
            return cls.parse(neuron)
        if not isinstance(neuron, tuple) or len(neuron) != 2:
            raise TypeError(f'neuron {neuron!r}: expected a Neuron, a (layer, index) pair or "L3N17"')
        if any(isinstance(part, bool) or not hasattr(part, "__index__") for part in neuron):
            raise TypeError(f"neuron {neuron!r}: expected whole numbers (layer, index)")
        layer, index = (int(part) for part in neuron)
        if layer < 0 or index < 0:
            raise ValueError(f"neuron {neuron!r}: layer and index count from 0, negative ones name nothing")
        return cls(layer, index)


NeuronLike = Neuron | tuple[int, int] | str


def by_layer(neurons: Iterable[NeuronLike]) -> dict[int, list[Neuron]]:
    """Group neurons by layer, layers and neurons in the order in which they first come.

    Example:
        >>> by_layer(["L1N2", (0, 5), "L1N0"])
        {1: [Neuron(layer=1, index=2), Neuron(layer=1, index=0)], 0: [Neuron(layer=0, index=5)]}
    """
    grouped: dict[int, list[Neuron]] = {}
    for neuron in map(Neuron.of, neurons):
        grouped.setdefault(neuron.layer, []).append(neuron)
    return grouped
