"""What all figures share: two themes, their colours, and how a token is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from html import escape

import plotly.graph_objects as go

FONT = "Inter, 'Segoe UI', system-ui, -apple-system, 'Helvetica Neue', Arial, sans-serif"
_LABEL = 0.08
"""Width of a tick's label, of the axis."""


@dataclass(frozen=True)
class Theme:
    """The colours of one theme, as hex strings."""

    background: str
    text: str
    muted: str
    """Axis titles and annotations."""
    grid: str
    grey: str
    """What a result is compared with: nulls, controls, the rest."""
    blue: str
    orange: str
    green: str
    pink: str
    yellow: str
    sky: str

    @property
    def cycle(self) -> tuple[str, ...]:
        """The colours of Okabe and Ito's palette that stand out on the background."""
        return self.blue, self.orange, self.green, self.pink, self.yellow, self.sky

    @property
    def scale(self) -> list[list[float | str]]:
        """From the background to blue, for heat maps."""
        return [[0.0, self.grid], [1.0, self.blue]]

    def template(self) -> go.layout.Template:
        """The plotly template of the theme."""
        axis = {
            "gridcolor": self.grid,
            "linecolor": self.grid,
            "zeroline": False,
            "ticks": "",
            "title": {"font": {"color": self.muted, "size": 13}, "standoff": 12},
            "tickfont": {"color": self.muted, "size": 12},
            "automargin": True,
        }
        return go.layout.Template(
            layout={
                "font": {"family": FONT, "size": 13, "color": self.text},
                "title": {"font": {"size": 19}, "x": 0, "y": 1, "yanchor": "top", "pad": {"l": 28, "t": 22}},
                "paper_bgcolor": self.background,
                "plot_bgcolor": self.background,
                "colorway": list(self.cycle),
                "xaxis": axis | {"showgrid": False, "showline": True},
                "yaxis": axis,
                "margin": {"l": 72, "r": 28, "t": 128, "b": 64},
                "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
                "hoverlabel": {
                    "bgcolor": self.background,
                    "bordercolor": self.muted,
                    "font": {"family": FONT, "color": self.text, "size": 13},
                    "align": "left",
                },
                "bargap": 0.3,
            }
        )


THEMES = {
    "light": Theme(
        background="#FFFFFF",
        text="#1B1F24",
        muted="#57606A",
        grid="#E8EAED",
        grey="#9AA1A9",
        blue="#0072B2",
        orange="#D55E00",
        green="#009E73",
        pink="#CC79A7",
        yellow="#E69F00",
        sky="#56B4E9",
    ),
    "dark": Theme(
        background="#14171C",
        text="#E6E9ED",
        muted="#A4ABB5",
        grid="#2B3038",
        grey="#78818D",
        blue="#56B4E8",
        orange="#FF8A3D",
        green="#2CC295",
        pink="#E29BC3",
        yellow="#F0E442",
        sky="#4C8FD6",
    ),
}


def of(name: str) -> Theme:
    """A theme by name.

    Raises:
        ValueError: neither "light" nor "dark".
    """
    if name not in THEMES:
        raise ValueError(f'theme: expected "light" or "dark", got {name!r}')
    return THEMES[name]


def require(name: str, given: object, *kinds: type) -> None:
    """Refuse what a figure cannot be made of.

    Raises:
        TypeError: it is of none of these kinds.
    """
    if not isinstance(given, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        article = "an" if expected[0] in "AEIOU" else "a"
        raise TypeError(f"{name}: expected {article} {expected}, got {type(given).__name__}")


def pairs() -> list[tuple[str, str]]:
    """Each colour of the light theme with its like in the dark one."""
    return list(zip(astuple(THEMES["light"]), astuple(THEMES["dark"]), strict=True))


def figure(colours: Theme, title: str, subtitle: str, x: str, y: str) -> go.Figure:
    """An empty figure with a title, what it shows in a line below, and named axes."""
    empty = go.Figure(layout={"template": colours.template()})
    titled(empty, colours, title, subtitle)
    return empty.update_xaxes(title_text=x).update_yaxes(title_text=y)


def titled(empty: go.Figure, colours: Theme, title: str, subtitle: str) -> go.Figure:
    """Give a figure its title and the line below it."""
    below = {"text": subtitle, "font": {"size": 13, "color": colours.muted}}
    return empty.update_layout(title={"text": title, "subtitle": below})


def faint(colour: str, opacity: int = 0x22) -> str:
    """A colour, mostly transparent."""
    return f"{colour}{opacity:02X}"


def quoted(token: str) -> str:
    """A token as Python writes it, so that spaces and what does not print show, and plotly sees no markup."""
    return escape(repr(token), quote=False)


def all_quoted(tokens: Iterable[str]) -> list[str]:
    """Tokens as `quoted` writes them."""
    return [quoted(token) for token in tokens]


def apart(values: list[float]) -> list[float]:
    """Rising values without those whose label would stand on the one before it, on a logarithmic axis."""
    least, told = (values[-1] / values[0]) ** _LABEL, values[:1]
    for value in values[1:]:
        if value >= told[-1] * least:
            told.append(value)
    return told
