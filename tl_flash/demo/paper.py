"""The paper's claims on any model: what `tl-flash demo --model` prints and writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tl_flash import (
    ActivationStats,
    ConceptHits,
    DoseWindow,
    JacobianLens,
    MentionRate,
    NeuronMap,
    activation_stats,
    check_lens,
    clamp_sweep,
    demo,
    dose_window,
    find_neurons,
    flash_decode,
    jacobian_lens,
    load_model,
    mention_rate,
    plots,
    validate,
)
from tl_flash.demo.written import write_figure, write_maps, write_table
from tl_flash.names import Neuron
from tl_flash.weights import read

WORDS = ("dog", "California")
ASKED = demo.favourite_questions("animal")
"""Questions on which the dose is chosen; none of those that count is among them."""
DOG = " dog"
MULTIPLES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Doses, in multiples of a neuron's max|hook_post| over texts."""
_TOGETHER = 12
"""Neurons, at most, that are clamped together to have a word spoken of."""


@dataclass(frozen=True, eq=False)
class Favourite:
    """A word spoken of in answers: where the dose was chosen, and what questions not looked at before are answered."""

    window: DoseWindow
    rate: MentionRate | None
    """None where the word shows at no dose."""


def paper(source: str, out: Path, say: Callable[[str], None], *, surface: str | None = None, tested: int = 20) -> None:
    """Decode a model, find neurons, clamp them, test labels and lens; print with `say`, write to `out`.

    Args:
        source: a model's name, folder or file, as `load_model` takes it.
        out: where figures and tables go.
        say: prints.
        surface: as in `load_model`.
        tested: how many labels of each reading are clamped.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = load_model(source, surface=surface)
    stats = activation_stats(model, demo.texts(60))  # first: it refuses what no hook reaches
    lens, weights = jacobian_lens(model), read(model)
    tokens = [token for word in WORDS if (token := f" {word}") in set(weights.vocab.names)]
    maps = readings(weights, lens, tokens)
    say(f"1. Decode\n\n{lens!r}\n")
    write_maps(maps, out, say)
    say(f"\nwhat neurons do, through the lens:\n{maps['lens'].specialised(12)}\n")

    say("2. Find\n")
    found = {word: find_neurons(weights, word, lens=lens, side="lens", n=24) for word in WORDS}
    for hits in found.values():
        say(f"{hits[:5]}\n")
    for token in tokens:
        write_figure(plots.token_by_layer(maps["lens"], token), out / f"{token.strip()}-by-layer")

    if DOG in tokens:
        [(neuron, unit)] = units(found["dog"], stats, 1).items()
        say(f'3. Clamp {neuron}, the first found for "dog": {DOG!r} after 20 neutral prompts\n')
        curve = clamp_sweep(model, neuron, [multiple * unit for multiple in MULTIPLES], demo.NEUTRAL_PROMPTS, [DOG])
        say(f"{curve}\n")
        write_table(curve.to_frame(), out / "dog-dose.csv")
        write_figure(plots.dose_curve(curve), out / "dog-dose")
    else:
        say(f"3. Not clamped: {DOG!r} is no token of this model\n")

    if getattr(model.tokenizer, "chat_template", None):
        dogs = units(found["dog"], stats, _TOGETHER)
        say(f"4. Its favourite animal, asked in ten ways; {len(dogs)} neurons, dose chosen on other questions\n")
        asked = favourite(model, dogs, "dog")
        write_table(asked.window.to_frame(), out / "favourite-animal-doses.csv")
        write_figure(plots.dose_curve(asked.window), out / "favourite-animal-doses")
        say(f"{asked.window}\n")
        if asked.rate is not None:
            write_table(asked.rate.to_frame(), out / "favourite-animal.csv")
            say(f"{asked.rate}\n")
    else:
        say("4. Not asked for its favourite animal: its tokenizer has no chat template\n")

    say(f"5. Do labels hold? The {tested} most specialised of each reading, at 5 times their max|hook_post|\n")
    held = {}
    for name, neurons in maps.items():
        hits = neurons.specialised(tested)
        if not hits:
            say(f"{name}: no neuron is beyond the null")
            continue
        held[name] = validate(model, hits, controls=10, stats=stats, lens=lens if name == "lens" else None)
        write_table(held[name].to_frame(), out / f"labels-{name}.csv")
        say(f"{name}: {held[name]!r}")
    if held:
        write_figure(plots.validation(*held.values()), out / "labels")

    layers = sorted({0, lens.layers[len(lens.layers) // 2], lens.layers[-1]})
    checked = check_lens(model, lens, demo.texts(8, seed=1), n=4, doses=[5.0], layers=layers)
    write_table(checked, out / "lens-check.csv")
    say(f"\n6. The lens, beside measured effects\n\n{checked.to_string(index=False, float_format='{:.2f}'.format)}\n")
    say(f"Figures and tables are in {out}/")


def readings(model: Any, lens: JacobianLens, tokens: Sequence[str] = ()) -> dict[str, NeuronMap]:
    """Every reading of a model's neurons: "in", "gate" where there is one, "out", and "lens", W_out carried on."""
    weights = read(model)
    maps = {side: flash_decode(weights, side=side, tokens=tokens) for side in weights.sides}
    return maps | {"lens": flash_decode(weights, side="out", lens=lens, tokens=tokens)}


def units(hits: ConceptHits, stats: ActivationStats, n: int) -> dict[Neuron, float]:
    """The first n neurons found that are active on the texts measured, each with its max|hook_post|, signs right.

    Raises:
        ValueError: none is.
    """
    active = tuple(hit for hit in hits if stats.abs_max_of(hit.neuron) > 0 and hit.write_z != 0)
    return replace(hits, hits=active[:n]).clamps(1.0, stats)


def favourite(
    model: Any,
    neurons: Mapping[Neuron, float],
    word: str,
    *,
    asked: Sequence[str] = ASKED,
    held_out: Sequence[str] = demo.HELD_OUT_FAVOURITE_ANIMAL,
    share: float = 0.5,
    chat: bool = True,
    **how: Any,
) -> Favourite:
    """Choose a dose on some questions, then ask others.

    It is the largest at which the answers read, if the word shows there, and else the smallest at which it shows.

    Args:
        model: an instruct model.
        neurons: what each is clamped by at dose 1.
        word: to be spoken of.
        asked: questions on which the dose is chosen.
        held_out: questions that count.
        share: of the answers to `asked` in which the word shows.
        chat: ask in the tokenizer's chat template.
        how: mode and positions, as in `clamp`.
    """
    window = dose_window(model, neurons, asked, word, chat=chat, share=share, **how)
    if window.low is None:
        return Favourite(window, None)
    values = window.clamps(window.high if window.open else window.low)
    return Favourite(window, mention_rate(model, held_out, word, values, chat=chat, **how))
