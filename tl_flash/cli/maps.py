"""Commands on maps: make one, search, show, compare, and write the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tl_flash.cli.options import (
    By,
    Count,
    Json,
    MapPath,
    ModelName,
    is_map,
    jsonable,
    load_map,
    print_results,
    read_records,
)


def decode(
    model: ModelName,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the map.")] = Path("map.safetensors"),
    side: Annotated[str, typer.Option(help="in, gate or out.")] = "in",
    score: Annotated[str, typer.Option(help="dot or cosine.")] = "dot",
    k: Annotated[int, typer.Option("-k", help="Tokens to keep at each pole.")] = 10,
    layer: Annotated[list[int] | None, typer.Option(help="A layer to decode; give it again for more.")] = None,
    token: Annotated[list[str] | None, typer.Option(help="A token whose logits to keep; give it again.")] = None,
    fold_ln: Annotated[bool, typer.Option(help="Fold the norms' scales in.")] = True,
    precision: Annotated[str, typer.Option(help="exact or fast.")] = "exact",
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda.")] = None,
    lens: Annotated[
        str | None,
        typer.Option(help="A Jacobian lens to carry what is written through: its file, or auto to make one."),
    ] = None,
    surface: Annotated[
        str | None, typer.Option(help="Build the model first, as bridge or hooked; else its checkpoint is read.")
    ] = None,
) -> None:
    """Decode every MLP neuron of a model and write the map.

    The checkpoint is read piece by piece. What is finished is kept beside the output: interrupted or killed, the same
    command goes on from there. Under `torchrun -m tl_flash decode ...` the processes share the work. `--lens auto` has
    to run the model, so it builds it, as bridge unless `--surface` says otherwise.

    Example: `tl-flash decode gpt2 -o gpt2.safetensors --side out --lens auto`
    """
    from tl_flash import JacobianLens, decode_to_file, load_model

    try:
        neurons = decode_to_file(
            load_model(model, surface=surface) if surface is not None or lens == "auto" else model,
            out,
            side=side,
            score=score,
            k=k,
            layers=layer,
            tokens=token,
            fold_ln=fold_ln,
            lens=lens if lens in (None, "auto") else JacobianLens.load(lens),
            precision=precision,
            device=device,
        )
    except KeyboardInterrupt as stop:
        typer.echo(f"interrupted: {stop or 'nothing was done yet'}", err=True)
        raise typer.Exit(130) from None
    if neurons is not None:
        typer.echo(f"{neurons}\nwrote {out}")


def find(
    model_or_map: Annotated[
        str, typer.Argument(metavar="MODEL_OR_MAP", help="A Hugging Face name, a model folder, or a map's file.")
    ],
    concept: Annotated[
        str,
        typer.Argument(help="Of a model: a word or phrase. Of a map: a token's exact string, leading space included."),
    ],
    n: Count = 10,
    by: Annotated[str, typer.Option(help="Rank by z, p or coherence; a map by z, prob, write or coherence.")] = "z",
    side: Annotated[
        list[str] | None, typer.Option(help="Of a model: in, gate, out or lens; give it again. By default all.")
    ] = None,
    related: Annotated[int, typer.Option(help="Of a model: nearest tokens to add.")] = 0,
    lens: Annotated[
        str | None, typer.Option(help="Of a model: a lens to read what is written through: its file, or auto.")
    ] = None,
    pole: Annotated[str, typer.Option(help="Of a map: positive, negative or both.")] = "both",
    as_json: Json = False,
) -> None:
    """Find the neurons about a concept: all of a model's, or those of a map whose top tokens hold a token.

    Example: `tl-flash find gpt2 dog --related 5`
    """
    if is_map(model_or_map):
        if side or related or lens:
            raise ValueError("--side, --related, --lens: they are of a search in a model, and a map was given")
        print_results([load_map(Path(model_or_map)).find(concept, n, pole, by)], as_json)
        return
    if pole != "both":
        raise ValueError("--pole: it is of a search in a map, and a model was given; its hits have both signs")
    from tl_flash import JacobianLens, find_neurons, load_model

    model = load_model(model_or_map, surface=None) if lens == "auto" else model_or_map
    through = "auto" if lens == "auto" else JacobianLens.load(lens) if lens else None
    hits = find_neurons(model, concept, sides=side, related=related, lens=through, n=n, by=by)
    print_results([hits], as_json)


def show(
    map: MapPath,
    neurons: Annotated[list[str] | None, typer.Argument(help="Neurons such as L3N17; without, the best.")] = None,
    n: Count = 20,
    by: By = "z",
    as_json: Json = False,
) -> None:
    """Show neurons: those named, or the most specialised.

    Example: `tl-flash show gpt2.safetensors L3N17`
    """
    loaded = load_map(map)
    if neurons:
        print_results([loaded[name] for name in neurons], as_json)
        return
    if not as_json:
        typer.echo(repr(loaded))
    print_results([loaded.specialised(n, by=by)], as_json)


def compare(
    a: MapPath,
    b: Annotated[Path, typer.Argument(metavar="MAP", help="The map to compare with, such as the instruct model's.")],
    n: Annotated[int, typer.Option("-n", help="How many changed neurons to list.")] = 20,
    as_json: Json = False,
) -> None:
    """Compare two maps: how many neurons keep their top token, layer by layer, and which do not.

    Example: `tl-flash compare base.safetensors instruct.safetensors`
    """
    import tl_flash

    comparison = tl_flash.compare(load_map(a), load_map(b))
    changed, parts = comparison.changed(n), comparison.by_specialisation()
    if as_json:
        tables = {"by_layer": comparison.to_frame(), "by_specialisation": parts, "changed": changed}
        records = {name: [jsonable(record) for record in frame.to_dict("records")] for name, frame in tables.items()}
        typer.echo(json.dumps({"agreement": comparison.agreement, "null": comparison.null} | records))
        return
    typer.echo(str(comparison))
    typer.echo("\nby how specialised the neurons are in the first map")
    typer.echo(parts.to_string(index=False, float_format="{:.3g}".format))
    typer.echo("\nthe surest of the neurons that changed")
    typer.echo(changed.to_string(index=False, float_format="{:.3g}".format))


def report(
    maps: Annotated[list[Path], typer.Argument(metavar="MAP...", help="Maps of one model, one a side.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the page.")] = Path("report.html"),
    compare: Annotated[
        list[Path] | None, typer.Option(help="Another model's map; give it again for more sides.")
    ] = None,
    validation: Annotated[list[Path] | None, typer.Option(help="What `tl-flash validate --json` printed.")] = None,
    concept: Annotated[
        list[str] | None, typer.Option(help="A concept to rank every neuron on; give it again. Asks for --model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model of the maps, to search for concepts.")] = None,
    figures: Annotated[bool, typer.Option(help="Carry figures, and plotly to draw them.")] = True,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
) -> None:
    """Write the explorer: one HTML page that searches maps and needs no network.

    Example: `tl-flash report base.safetensors --compare instruct.safetensors -o base.html`
    """
    import pandas as pd

    import tl_flash
    from tl_flash import report as explorer

    if bool(concept) != (model is not None):
        raise ValueError("--concept: expected it and --model together, to search that model for it")
    loaded = [load_map(path) for path in maps]
    sides = {map.side: map for map in loaded}
    others = [load_map(path) for path in compare or ()]
    page = explorer.write(
        loaded,
        out,
        compare=[tl_flash.compare(sides.get(other.side, loaded[0]), other) for other in others],
        validation=[pd.DataFrame(read_records(path)) for path in validation or ()],
        concepts=tl_flash.concepts(model, concept) if concept else None,
        figures=None if figures else (),
        title=title,
    )
    typer.echo(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")
