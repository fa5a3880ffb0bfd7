"""Figures of measured effects: of a clamp by dose, of labels beside controls, of what a reading predicts."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_flash.evidence import DoseCurve, DoseWindow, Validation
from tl_flash.show.plots import theme as themes
from tl_flash.show.plots.theme import Theme, all_quoted, quoted

if TYPE_CHECKING:
    import pandas as pd


LENS_COLUMNS = ("layer", "dose", "reading", "correlation")


def dose_curve(curve: DoseCurve | DoseWindow, *, theme: str = "light") -> go.Figure:
    """What a clamp does by its dose: to tokens' probabilities, or to the text that a model writes.

    Of a `DoseCurve` the mean probability of each token, with its 95% band over the prompts; dotted lines stand at the
    unclamped probabilities. Of a `DoseWindow` the share of completions that speak of the word, above how the text
    reads, perplexity and distinct bigrams, with the window shaded.

    Args:
        curve: of `clamp_sweep`, or of `dose_window`.
        theme: "light" or "dark".

    Raises:
        TypeError: something else in place of what this draws.
        ValueError: an unknown theme.

    Example:
        >>> from tl_flash import plots
        >>> len(plots.dose_curve(clamp_sweep(model, "L1N3", [0.0, 4.0], ["One day,"], [5])).data)
        2
    """
    themes.require("curve", curve, DoseCurve, DoseWindow)
    colours = themes.of(theme)
    if isinstance(curve, DoseWindow):
        return _window(curve, colours)
    records = curve.to_frame().to_dict("records")
    figure = themes.figure(
        colours,
        f"Clamping {curve.neuron} moves the next token",
        f"mean over {curve.prob.shape[1]} prompts with its 95% band · dotted: unclamped",
        f"hook_post of {curve.neuron} set to",
        "probability of the next token",
    )
    for i, token in enumerate(curve.tokens):
        colour = colours.cycle[i % len(colours.cycle)]
        unclamped, *clamped = (record for record in records if record["token"] == token)
        clamped.sort(key=lambda record: record["value"])
        values = [record["value"] for record in clamped]
        band = [record["prob_high"] for record in clamped] + [record["prob_low"] for record in reversed(clamped)]
        figure.add_scatter(
            x=values + values[::-1],
            y=band,
            mode="lines",
            fill="toself",
            fillcolor=themes.faint(colour),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_scatter(
            x=values,
            y=[record["prob"] for record in clamped],
            mode="lines+markers",
            name=quoted(token),
            line={"color": colour, "width": 2.5},
            marker={"size": 7},
            text=[quoted(token)] * len(values),
            customdata=[record["rank"] for record in clamped],
            hovertemplate=(
                f"<b>{curve.neuron}</b> at %{{x:.3g}}<br>token %{{text}}<br>probability %{{y:.3g}}"
                "<br>median rank %{customdata:.0f}<extra></extra>"
            ),
        )
        figure.add_hline(y=unclamped["prob"], line={"color": colour, "dash": "dot", "width": 1})
    return figure.update_yaxes(rangemode="tozero", tickformat=".0~%").update_layout(showlegend=True)


def _window(window: DoseWindow, colours: Theme) -> go.Figure:
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.09)
    figure.update_layout(template=colours.template())
    title, _, found = escape(repr(window)).rpartition(": ")
    themes.titled(figure, colours, title, f"{found} · greedy completions of {window.shows.shape[1]} prompts")
    doses = window.doses[1:].tolist()
    lines = (
        (1, f"speak of {quoted(window.looked_for)}", window.share_shown, colours.blue, "solid", ".0%"),
        (2, "perplexity", window.perplexity_ratio, colours.orange, "solid", ".3g"),
        (2, "distinct bigrams", window.distinct_ratio, colours.green, "solid", ".0%"),
    )
    for row, name, values, colour, dash, shown in lines:
        figure.add_scatter(
            x=doses,
            y=values[1:].tolist(),
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2.5, "dash": dash},
            hovertemplate=f"{name}: %{{y:{shown}}} at %{{x:.3g}} times the units<extra></extra>",
            row=row,
            col=1,
        )
    if window.open:
        figure.add_vrect(
            x0=window.low, x1=window.high, fillcolor=themes.faint(colours.green), line_width=0, row="all", col="all"
        )
    told = themes.apart(doses)
    figure.update_xaxes(type="log", tickvals=told, ticktext=[f"{dose:.3g}" for dose in told], tickangle=0)
    figure.update_xaxes(title="dose, in units of the clamp", row=2, col=1)
    figure.update_yaxes(range=[-0.04, 1.04], tickformat=".0%", title="completions", row=1, col=1)
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20]
    figure.update_yaxes(type="log", tickvals=ticks, title="over the unclamped", row=2, col=1)
    return figure


def validation(*validations: Validation, theme: str = "light") -> go.Figure:
    """What clamps did to neurons' labels, beside what clamping matched controls did to the same tokens, by side.

    Args:
        validations: one a side (or of several runs); each shows as its own group.
        theme: "light" or "dark".

    Raises:
        TypeError: something else in place of what this draws.
        ValueError: no validations, or an unknown theme.

    Example:
        >>> from tl_flash import plots
        >>> labels = flash_decode(model, side="out").specialised(2, quantile=0.5)
        >>> len(plots.validation(validate(model, labels, controls=3)).data)
        3
    """
    for run in validations:
        themes.require("validations", run, Validation)
    colours = themes.of(theme)
    if not validations:
        raise ValueError("validations: expected at least one Validation, as tl_flash.validate makes them, got none")
    counts = ", ".join(dict.fromkeys(str(len(run.records)) for run in validations))
    prompts = ", ".join(dict.fromkeys(str(run.prompts) for run in validations))
    figure = themes.figure(
        colours,
        "Does clamping a neuron raise its label?",
        f"{counts} neurons each, {prompts} prompts · controls: the same layer, matched on ||W_out||",
        "reading that gave the label",
        "change of the label's log-probability, nats",
    )
    listed: set[str] = set()
    for at, run in enumerate(validations):
        frame = run.to_frame().sort_values("dlogp", kind="stable", ignore_index=True)
        first = at == 0
        figure.add_violin(
            x=np.full(run.control_effects.numel(), at, dtype=float),
            y=run.control_effects.flatten().numpy(),
            name="matched controls",
            legendgroup="controls",
            showlegend=first,
            side="negative",
            points=False,
            spanmode="hard",
            width=0.7,
            line={"color": colours.grey, "width": 1},
            fillcolor=themes.faint(colours.grey, 0x40),
            hoverinfo="skip",
        )
        for part, label, colour in (
            (frame["q_value"] > 0.05, "label, not significant", colours.orange),
            (frame["q_value"] <= 0.05, "label, q ≤ 0.05", colours.blue),
        ):
            rows = frame[part]
            in_legend = len(rows) > 0 and label not in listed
            listed |= {label} if in_legend else set()
            figure.add_scatter(
                x=at + 0.08 + 0.3 * (rows.index.to_numpy() + 0.5) / len(frame),
                y=rows["dlogp"],
                error_y={
                    "array": rows["dlogp_high"] - rows["dlogp"],
                    "arrayminus": rows["dlogp"] - rows["dlogp_low"],
                    "color": themes.faint(colour, 0x66),
                    "thickness": 1,
                    "width": 0,
                },
                mode="markers",
                name=label,
                legendgroup=label,
                showlegend=in_legend,
                marker={"color": colour, "size": 7},
                text=all_quoted(rows["token"]),
                customdata=rows[["neuron", "value", "write_z", "control_dlogp", "q_value"]],
                hovertemplate=(
                    "<b>%{customdata[0]}</b> set to %{customdata[1]:.3g}<br>token %{text}<br>%{y:+.2f} nats, controls "
                    "%{customdata[3]:+.2f}<br>q %{customdata[4]:.2g}<br>write z %{customdata[2]:+.2f}<extra></extra>"
                ),
            )
    told = [
        f"{run.reading.replace(', ', '<br>')}<br>{run.share_raised():.0%} raised<br>"
        f"{run.share_significant():.0%} significant"
        for run in validations
    ]
    figure.add_hline(y=0, line={"color": colours.muted, "width": 1})
    ticks = {"tickvals": list(range(len(told))), "ticktext": told, "tickangle": 0}
    figure.update_xaxes(**ticks, range=[-0.5, len(told) - 0.5], showline=False)
    return figure


def lens_effects(frame: pd.DataFrame, *, theme: str = "light") -> go.Figure:
    """How well write readings predict what clamps do, by layer, a panel a dose.

    Args:
        frame: as `check_lens` gives it: columns `layer`, `dose` (of the clamp, in standard deviations of hook_post),
            `reading` ("plain", "lens", or another name) and `correlation` (over the vocabulary, of the reading with the
            measured change of the log-probabilities); bars are 1.96 of `correlation_stderr` and a dotted line is the
            `ceiling`, where they are there.
        theme: "light" or "dark".

    Raises:
        TypeError: something else in place of what this draws.
        ValueError: a column that is missing, no rows, or an unknown theme.

    Example:
        >>> from tl_flash import plots
        >>> frame = check_lens(model, jacobian_lens(model, ["One day,", "The cat"]), ["I think that"], n=2)
        >>> [trace.name for trace in plots.lens_effects(frame).data[:2]]
        ['through the Jacobian lens', 'W_out alone']
    """
    import pandas as pd

    themes.require("frame", frame, pd.DataFrame)
    colours = themes.of(theme)
    missing = [column for column in LENS_COLUMNS if column not in frame]
    if missing or not len(frame):
        raise ValueError(f"frame: expected rows of {', '.join(LENS_COLUMNS)}; {', '.join(missing) or 'rows'} missing")
    doses = sorted(frame["dose"].unique())
    titles = [f"{dose:g} std" for dose in doses]
    panels = make_subplots(1, len(doses), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=titles)
    panels.update_layout(template=colours.template()).update_annotations(font={"size": 13, "color": colours.muted})
    themes.titled(
        panels,
        colours,
        "How well a write reading predicts what a clamp does",
        "correlation over the vocabulary with the measured change, by the dose clamped to",
    )
    looks = {"lens": (colours.blue, "through the Jacobian lens"), "plain": (colours.orange, "W_out alone")}
    looks |= {
        "mean_field": (colours.blue, "mean-field lens"),
        "exact": (colours.cycle[2], "exact lens"),
        "mixed": (colours.cycle[3], "mixed lens"),
    }
    for column, (_, at_dose) in enumerate(frame.groupby("dose"), start=1):
        for i, (reading, rows) in enumerate(at_dose.groupby("reading")):
            colour, name = looks.get(str(reading), (colours.cycle[2 + i % 4], quoted(str(reading))))
            panels.add_scatter(
                x=rows["layer"],
                y=rows["correlation"],
                error_y=_bars(rows, colour),
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour, "width": 2.5},
                marker={"size": 8},
                hovertemplate=f"layer %{{x}}<br>{name}<br>correlation %{{y:.2f}}<extra></extra>",
                row=1,
                col=column,
            )
        known = at_dose.dropna(subset=["ceiling"]) if "ceiling" in frame else at_dose.head(0)
        if len(known):
            ceiling = known.groupby("layer", as_index=False)["ceiling"].first()
            panels.add_scatter(
                x=ceiling["layer"],
                y=ceiling["ceiling"],
                name="ceiling",
                legendgroup="ceiling",
                showlegend=column == 1,
                mode="lines",
                line={"color": colours.muted, "width": 1.5, "dash": "dot"},
                hovertemplate="layer %{x}<br>ceiling %{y:.2f}<extra></extra>",
                row=1,
                col=column,
            )
    panels.update_layout(legend={"y": 1.08})
    panels.update_xaxes(title_text="layer", tickvals=sorted(frame["layer"].unique()))
    panels.update_yaxes(range=[min(0.0, float(frame["correlation"].min())), 1.02])
    return panels.update_yaxes(title_text="correlation", row=1, col=1)


def _bars(rows: Any, colour: str) -> dict[str, object]:
    if "correlation_stderr" not in rows:
        return {}
    return {"array": 1.96 * rows["correlation_stderr"], "color": colour, "thickness": 1, "width": 0}
