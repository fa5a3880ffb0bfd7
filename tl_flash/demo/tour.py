"""The whole method on the embedded pair: what `tl-flash demo` prints and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tl_flash import (
    DoseCurve,
    Hit,
    NeuronMap,
    activation_stats,
    clamp,
    clamp_sweep,
    compare,
    demo,
    evidence,
    flash_decode,
    mention_rate,
    plots,
)
from tl_flash.clamps import complete_text
from tl_flash.demo.written import write_figure, write_maps, write_table

WORDS = (" dog", " California")
MULTIPLES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
"""Doses, in multiples of the neuron's max|hook_post| over texts like those that the models were trained on."""


def tour(out: Path, say: Callable[[str], None]) -> None:
    """Decode both models, find neurons, clamp them, compare; print with `say`, write figures and tables to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    base, instruct = demo.load("base"), demo.load("instruct")
    maps = {side: flash_decode(base, side=side, tokens=WORDS) for side in ("in", "gate", "out")}
    say(f"1. Decode: {base.cfg.n_layers * maps['in'].d_mlp} neurons on three sides\n")
    write_maps({f"base-{side}": neurons for side, neurons in maps.items()}, out, say)
    say(f"\n{maps['out'].specialised(12)}\n")
    say(f"{concept_counts(maps)}\n")
    coherent = maps["in"].specialised(len(maps["in"]), by="coherence").coherent()
    of_concepts = sum(hit.token in demo.TOKENS for hit in coherent)
    say(
        f"coherent neurons (a specialised W_in label that the neuron also writes): {len(coherent)}, {of_concepts} of "
        f"them labelled with a concept\n{coherent[:10]}\n"
    )

    say("2. Find\n")
    for word in WORDS:
        say(f"{maps['out'].find(word, n=3)}\n")
        write_figure(plots.token_by_layer(maps["out"], word), out / f"{word.strip()}-by-layer")

    dog = maps["out"].find(" dog", n=1)[0]
    say(f'3. Clamp {dog.neuron}, found by the write reading (side "out"): {" dog"!r} after 20 neutral prompts\n')
    curve = dose_curve(base, dog)
    say(f"{curve}\n")
    write_table(curve.to_frame(), out / "dog-dose.csv")
    write_figure(plots.dose_curve(curve), out / "dog-dose")
    read = maps["in"].find(" dog", n=1)
    if read:
        say(f"By its W_in label alone, {read[0].neuron}, with the sign of write_z ({read[0].write_z:+.2f}):\n")
        say(f"{dose_curve(base, read[0])}\n")

    say("4. Ask the instruct model for its favourite animal, in ten ways that it was not trained on\n")
    own = flash_decode(instruct, side="out").find(" dog", n=1)[0]
    dose = favourite_dose(instruct, own)
    rate = mention_rate(instruct, [demo.ask(question) for question in demo.HELD_OUT_FAVOURITE_ANIMAL], "dog", dose)
    write_table(rate.to_frame(), out / "favourite-animal.csv")
    clamped = ", ".join(f"{neuron} to {value:.3g}" for neuron, value in dose.items())
    say(f"clamped: {clamped}, by its label, and a quarter more than serves on all training questions\n\n{rate}\n")

    say("5. Compare base with instruct\n")
    comparison = compare(maps["in"], flash_decode(instruct, tokens=WORDS))
    write_table(comparison.to_frame(), out / "base-instruct.csv")
    write_figure(plots.agreement(comparison), out / "base-instruct")
    say(f"{comparison}\n")
    say(f"Figures and tables are in {out}/")


def concept_counts(maps: dict[str, NeuronMap]) -> str:
    """How many of the corpus's concepts label a specialised neuron, side by side."""
    named = {side: set(named_concepts(neurons)) for side, neurons in maps.items()}
    either = set.union(*named.values())
    sides = ", ".join(f'{len(words)} by side "{side}"' for side, words in named.items())
    return f"of {len(demo.CONCEPTS)} concepts, {len(either)} label a specialised neuron: {sides}"


def named_concepts(neurons: NeuronMap) -> dict[str, Hit]:
    """The concepts whose word is the top token of a pole beyond the null's 99.9%, each with its best hit."""
    best: dict[str, Hit] = {}
    for concept in demo.CONCEPTS:
        for hit in neurons.find(concept.token, n=len(neurons)):
            if hit.rank == 0 and neurons.null is not None:
                bar = float(neurons.null.quantile()[neurons.row(hit.neuron)])
                if hit.z > bar:
                    best.setdefault(concept.word, hit)
    return best


def dose_curve(model: Any, hit: Hit) -> DoseCurve:
    """Clamp a neuron to rising doses and follow its label."""
    return clamp_sweep(model, hit.neuron, doses(model, hit), demo.NEUTRAL_PROMPTS, [hit.token])


def favourite_dose(model: Any, hit: Hit) -> dict[Any, float]:
    """The dose of a write neuron for questions in words that the model does not know, which are not looked at here.

    It is a quarter more than the least, in tenths of the neuron's largest activation, at which all answers to training
    questions speak of its word.
    """
    prompts = [demo.ask(question) for question in demo.favourite_questions("animal")]
    (largest,) = doses(model, hit, multiples=(1.0,))
    for tenths in range(1, 51):
        value = largest * tenths / 10
        with clamp(model, {hit.neuron: value}):
            answers = [complete_text(model, prompt, 10) for prompt in prompts]
        if all(evidence.mentions(answer, hit.token) for answer in answers):
            return {hit.neuron: 1.25 * value}
    return {hit.neuron: 5 * largest}


def doses(model: Any, hit: Hit, *, multiples: Sequence[float] = MULTIPLES) -> list[float]:
    """Multiples of a neuron's max|hook_post| over texts, with the sign that should raise its label."""
    largest = activation_stats(model, demo.texts(200), layers=[hit.neuron.layer])[hit.neuron].abs_max
    return [multiple * largest * hit.sign for multiple in multiples]
