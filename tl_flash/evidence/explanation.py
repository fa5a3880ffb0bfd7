"""Which neurons made a model predict a token: the result of `explain`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from tl_flash.evidence.curve import Curve
from tl_flash.names import Neuron, shown_model

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ExplainedNeuron:
    """A neuron at a position of the prompt."""

    neuron: Neuron
    position: int
    at: str
    """The token there."""
    activation: float
    """hook_post."""
    level: float
    """Where that lies among the neuron's activations on reference texts, 0 to 1; NaN where none were measured."""
    attribution: float
    """(activation - reference) times the gradient of the score: what it gives to first order."""
    share: float
    """Of the absolute attributions of all neurons at all positions, with its sign."""
    effect: float
    """Measured change of the score when it is set to its reference, opposite in sign to what it gives; NaN where it was
    not measured."""
    control_effect: float
    """The same of a random neuron of the layer with a like activation at that position."""
    length: float
    """Of what it writes, beside that of the residual stream after its layer."""
    label_in: str
    """Top token of its W_in, at the pole that it reads here."""
    label_out: str
    """Top token of what it writes here: W_out with the sign of the activation, through a lens where one was given."""
    write_z: float
    """z-score of the explained token in its write direction W_out."""


_FORMATS = {"activation": ".2f", "level": ".0%", "attribution": "+.3f", "share": "+.1%", "effect": "+.3f"} | {
    "control_effect": "+.3f",
    "length": ".0%",
    "write_z": "+.1f",
}


@dataclass(frozen=True, eq=False)
class Explanation:
    """Which neurons made a model predict a token, most to least: a sequence of `ExplainedNeuron`."""

    model: str
    prompt: tuple[str, ...]
    """Its tokens."""
    token: str
    token_id: int
    against: str | None
    logit: float
    """What is explained: the token's logit minus the mean over the vocabulary, or minus that of `against`."""
    prob: float
    rule: str
    reference: str
    lens: str | None
    """Fingerprint of the lens that labels were read through."""
    neurons: tuple[ExplainedNeuron, ...]
    places: Float[Tensor, "layer position"]
    """The sum of the attributions of a layer's neurons at a position."""
    flow: Float[Tensor, " layer+1"]
    """The residual stream before each layer, and after the last, times its gradient, summed. By rule "relp" each equals
    the logit, but for the biases that come later."""
    curve: Curve | None

    def __len__(self) -> int:
        return len(self.neurons)

    def __getitem__(self, index: int) -> ExplainedNeuron:
        return self.neurons[index]

    def __iter__(self) -> Iterator[ExplainedNeuron]:
        return iter(self.neurons)

    def at(self, position: int) -> tuple[ExplainedNeuron, ...]:
        """Those of its neurons that act at a position of the prompt."""
        return tuple(one for one in self.neurons if one.position == position)

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a neuron; the columns are `ExplainedNeuron`'s fields, the neuron by its name."""
        import pandas as pd

        names = list(ExplainedNeuron.__dataclass_fields__)
        records = [asdict(one) | {"neuron": str(one.neuron)} for one in self.neurons]
        return pd.DataFrame(records, columns=pd.Index(names))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: lists, strings, numbers, and None for what was not measured."""
        names = ("model", "token", "token_id", "against", "logit", "prob", "rule", "reference", "lens")
        records = self.to_frame().to_dict("records")
        return {name: getattr(self, name) for name in names} | {
            "prompt": list(self.prompt),
            "neurons": [{str(name): _plain(value) for name, value in record.items()} for record in records],
            "places": self.places.tolist(),
            "flow": self.flow.tolist(),
            "curve": None if self.curve is None else self.curve.to_dict(),
        }

    def __repr__(self) -> str:
        beside = "" if self.against is None else f" against {self.against!r}"
        return (
            f"{shown_model(self.model)} after {''.join(self.prompt)!r}: {self.token!r}{beside}, "
            f"logit {self.logit:+.2f}, probability {self.prob:.1%}"
        )

    def __str__(self) -> str:
        return "\n".join([repr(self), *self._notes(), self._table().to_string(index=False)])

    def _repr_html_(self) -> str:
        from html import escape

        head = "<br>".join(map(escape, [repr(self), *self._notes()]))
        return f"<p>{head}</p>{self._table().to_html(index=False, border=0)}"

    def _notes(self) -> list[str]:
        if self.curve is None:
            return []
        few, random = self.curve.suffices(), self.curve.suffices(random=True)
        return [f"{few:,} of {self.curve.counts[-1]:,} neurons at positions restore 80%; {random:,} in random order"]

    def _table(self) -> pd.DataFrame:
        frame = self.to_frame()
        for name in ("at", "label_in", "label_out"):
            frame[name] = frame[name].map(repr)
        for name, how in _FORMATS.items():
            frame[name] = ["" if math.isnan(value) else format(value, how) for value in frame[name]]
        return frame.loc[:, [bool((frame[name] != "").any()) for name in frame]]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
