"""Commands on a model: show its layout, clamp, validate, explain a prompt, make a lens, and the demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tl_flash.artefacts import require_place
from tl_flash.cli.options import By, Count, Json, MapPath, ModelName, Surface, load_map, print_results, read_text

if TYPE_CHECKING:
    from tl_flash import JacobianLens


def clamp(
    model: ModelName,
    neurons: Annotated[list[str], typer.Argument(help="What to clamp and to what value, such as L3N17=8.0.")],
    prompt: Annotated[list[str], typer.Option(help="A text to complete; give it again for more.")],
    mode: Annotated[str, typer.Option(help="set, add, multiply, floor or ceil.")] = "set",
    positions: Annotated[str | None, typer.Option(help="prompt, generated or last; by default all.")] = None,
    new_tokens: Annotated[int, typer.Option(help="How many tokens to generate at most.")] = 24,
    chat: Annotated[
        bool, typer.Option(help="The texts are what a user says, in the tokenizer's chat template.")
    ] = False,
    surface: Surface = None,
    as_json: Json = False,
) -> None:
    """Let a model complete texts without and with clamped neurons.

    Example: `tl-flash clamp gpt2 L11N100=20 --prompt "My favourite animal is"`
    """
    from tl_flash import clamp as clamped
    from tl_flash import load_model
    from tl_flash.clamps import complete_text

    pairs = [neuron_value(text) for text in neurons]
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"neurons: expected each once, got {', '.join(neurons)}")
    loaded = load_model(model, surface=surface)
    before = [complete_text(loaded, text, new_tokens, chat=chat) for text in prompt]
    with clamped(loaded, values, mode=mode, positions=positions):  # pyright: ignore[reportArgumentType] - it checks
        after = [complete_text(loaded, text, new_tokens, chat=chat) for text in prompt]
    records = [
        dict(zip(("prompt", "before", "after"), row, strict=True)) for row in zip(prompt, before, after, strict=True)
    ]
    if as_json:
        typer.echo(json.dumps(records, ensure_ascii=False))
        return
    for record in records:
        typer.echo(f"{record['prompt']!r}\n  before: {record['before'].strip()}\n  after:  {record['after'].strip()}")


def validate(
    model: ModelName,
    map: MapPath,
    n: Count = 50,
    by: By = "z",
    controls: Annotated[int, typer.Option(help="Matched random neurons a neuron.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the draw of controls.")] = 0,
    lens: Annotated[str | None, typer.Option(help="The lens that the map was made with: its file, or auto.")] = None,
    surface: Surface = None,
    as_json: Json = False,
) -> None:
    """Clamp the most specialised neurons of a map and see whether their labels are raised.

    Example: `tl-flash validate gpt2 gpt2.safetensors -n 20`
    """
    from tl_flash import load_model
    from tl_flash import validate as validated

    hits = load_map(map).specialised(n, by=by)
    result = validated(load_model(model, surface=surface), hits, controls=controls, seed=seed, lens=_lens(lens))
    print_results([result], as_json)


def explain(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="A text; what the model says after it is explained.")],
    token: Annotated[str | None, typer.Option(help="The token to explain; by default the one predicted.")] = None,
    against: Annotated[str | None, typer.Option(help="A token whose logit is taken off.")] = None,
    n: Count = 20,
    measure: Annotated[bool, typer.Option(help="Set neurons to their references, to see whether it is true.")] = True,
    rule: Annotated[str, typer.Option(help="gradient, frozen or relp.")] = "gradient",
    reference: Annotated[str, typer.Option(help="zero or mean.")] = "zero",
    lens: Annotated[str | None, typer.Option(help="A lens to label through: its file, or auto to make one.")] = None,
    chat: Annotated[bool, typer.Option(help="The text is what a user says, in the tokenizer's chat template.")] = False,
    surface: Surface = None,
    as_json: Json = False,
) -> None:
    """Name the neurons that made a model predict a token after a text.

    Example: `tl-flash explain gpt2 "The capital of France is" --token " Paris"`
    """
    from tl_flash import explain as explained
    from tl_flash import load_model

    found = explained(
        load_model(model, surface=surface),
        prompt,
        token=token,
        against=against,
        n=n,
        measure=measure,
        rule=rule,  # pyright: ignore[reportArgumentType] - it checks
        reference=reference,  # pyright: ignore[reportArgumentType] - it checks
        lens=_lens(lens),
        chat=chat,
    )
    typer.echo(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else str(found))


def layout(model: ModelName) -> None:
    """Show where a model keeps its neurons, layer by layer where they differ: compare it with the model's code.

    Only config.json is read; what is shown was found on a tiny model of its class.

    Example: `tl-flash layout meta-llama/Llama-3.1-8B`
    """
    from tl_flash.weights import layout as found

    typer.echo(str(found(model)))


def lens(
    model: ModelName,
    prompts: Annotated[
        Path | None, typer.Argument(help="A text file, a prompt a line; by default texts of the package's own.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the lens.")] = Path("lens.safetensors"),
    method: Annotated[str, typer.Option(help="mean_field, exact or mixed.")] = "mean_field",
    surface: Surface = None,
) -> None:
    """Make the Jacobian lens of a model, for `tl-flash decode --lens`.

    Example: `tl-flash lens gpt2 -o gpt2-lens.safetensors`
    """
    from tl_flash import jacobian_lens, load_model

    require_place(out, "the lens")
    texts = None if prompts is None else [line for line in read_text(prompts).splitlines() if line.strip()]
    loaded = load_model(model, surface=surface)
    made = jacobian_lens(loaded, texts, method=method)  # pyright: ignore[reportArgumentType] - it checks
    made.save(out)
    typer.echo(f"{made}\nwrote {out}")


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write figures and tables.")] = Path("demo-output"),
    model: Annotated[
        str | None, typer.Option(help="A model of your own: name, folder or file; by default the pair of the package.")
    ] = None,
    surface: Surface = None,
) -> None:
    """Run the whole method on the model pair that the package carries, or on a model of your own.

    Example: `tl-flash demo --model HuggingFaceTB/SmolLM2-135M-Instruct`
    """
    if model is None:
        from tl_flash.demo.tour import tour

        if surface is not None:
            raise ValueError("surface: it is for --model, which was not given; leave it out")
        tour(out, typer.echo)
    else:
        from tl_flash.demo.paper import paper

        paper(model, out, typer.echo, surface=surface)


def _lens(name: str | None) -> JacobianLens | Literal["auto"] | None:
    """A lens by its file's name, or what stands for one that is made."""
    from tl_flash import JacobianLens

    return "auto" if name == "auto" else JacobianLens.load(name) if name else None


def neuron_value(text: str) -> tuple[str, float]:
    """Read ``L3N17=8.0``."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"neurons: expected a neuron and its value, such as L3N17=8.0, got {text!r}") from None
