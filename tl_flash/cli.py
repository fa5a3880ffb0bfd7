"""The command line: each command parses, calls one library function, and prints or writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tl_flash.hits import Hits
    from tl_flash.neuron_map import NeuronMap
    from tl_flash.reading import NeuronReading
    from tl_flash.validation import Validation

app = typer.Typer(
    help="Say what each MLP neuron of a language model stands for, straight from its weights.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

MapPath = Annotated[Path, typer.Argument(metavar="MAP", help="A map that `tl-flash decode` wrote.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face name or a model folder.")]
Surface = Annotated[str, typer.Option(help="Load as bridge (TransformerBridge) or hooked (HookedTransformer).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Count = Annotated[int, typer.Option("-n", help="How many at most.")]
By = Annotated[str, typer.Option(help="Rank by z, prob, write or coherence.")]


@app.command()
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
    lens: Annotated[Path | None, typer.Option(help="A Jacobian lens to carry what is written through.")] = None,
    surface: Annotated[
        str | None, typer.Option(help="Build the model first, as bridge or hooked; else its checkpoint is read.")
    ] = None,
) -> None:
    """Decode every MLP neuron of a model and write the map.

    The checkpoint is read piece by piece. What is finished is kept beside the output: interrupted or killed, the same
    command goes on from there. Under `torchrun -m tl_flash decode ...` the processes share the work.

    Example: `tl-flash decode gpt2 -o gpt2.safetensors --side out`
    """
    from tl_flash import JacobianLens, loading
    from tl_flash.resume import decode_to_file

    try:
        neurons = decode_to_file(
            model if surface is None else loading.load(model, surface),
            out,
            side=side,
            score=score,
            k=k,
            layers=layer,
            tokens=token,
            fold_ln=fold_ln,
            lens=None if lens is None else JacobianLens.load(lens),
            precision=precision,
            device=device,
        )
    except KeyboardInterrupt as stop:
        typer.echo(f"interrupted: {stop or 'nothing was done yet'}", err=True)
        raise typer.Exit(130) from None
    if neurons is not None:
        typer.echo(f"{neurons}\nwrote {out}")


@app.command()
def lens(
    model: ModelName,
    prompts: Annotated[Path, typer.Argument(help="A text file, a prompt a line.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the lens.")] = Path("lens.safetensors"),
    surface: Surface = "bridge",
) -> None:
    """Make the Jacobian lens of a model from prompts, for `tl-flash decode --lens`.

    Example: `tl-flash lens gpt2 prompts.txt -o gpt2-lens.safetensors`
    """
    from tl_flash import jacobian_lens, loading

    texts = [line for line in prompts.read_text().splitlines() if line.strip()]
    made = jacobian_lens(loading.load(model, surface), texts)
    made.save(out)
    typer.echo(f"{made}\nwrote {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write figures and tables.")] = Path("demo-output"),
) -> None:
    """Run the whole method on the model pair that the package carries.

    Example: `tl-flash demo`
    """
    from tl_flash.demo.tour import tour

    tour(out, typer.echo)


@app.command()
def find(
    map: MapPath,
    token: Annotated[str, typer.Argument(help="The token's exact string, leading space included.")],
    n: Count = 10,
    pole: Annotated[str, typer.Option(help="positive, negative or both.")] = "both",
    by: By = "z",
    as_json: Json = False,
) -> None:
    """Find the neurons whose top tokens hold a token.

    Example: `tl-flash find gpt2.safetensors " dog" --by coherence`
    """
    _print([_load(map).find(token, n, pole, by)], as_json)


@app.command()
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
    loaded = _load(map)
    if neurons:
        _print([loaded[name] for name in neurons], as_json)
        return
    if not as_json:
        typer.echo(repr(loaded))
    _print([loaded.specialised(n, by=by)], as_json)


@app.command()
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

    comparison = tl_flash.compare(_load(a), _load(b))
    changed, parts = comparison.changed(n), comparison.by_specialisation()
    if as_json:
        tables = {"by_layer": comparison.to_frame(), "by_specialisation": parts, "changed": changed}
        records = {name: [_jsonable(record) for record in frame.to_dict("records")] for name, frame in tables.items()}
        typer.echo(json.dumps({"agreement": comparison.agreement, "null": comparison.null} | records))
        return
    typer.echo(str(comparison))
    typer.echo("\nby how specialised the neurons are in the first map")
    typer.echo(parts.to_string(index=False, float_format="{:.3g}".format))
    typer.echo("\nthe surest of the neurons that changed")
    typer.echo(changed.to_string(index=False, float_format="{:.3g}".format))


@app.command()
def clamp(
    model: ModelName,
    neurons: Annotated[list[str], typer.Argument(help="What to clamp and to what value, such as L3N17=8.0.")],
    prompt: Annotated[list[str], typer.Option(help="A text to complete; give it again for more.")],
    mode: Annotated[str, typer.Option(help="set, add, multiply, floor or ceil.")] = "set",
    positions: Annotated[str | None, typer.Option(help="prompt, generated or last; by default all.")] = None,
    new_tokens: Annotated[int, typer.Option(help="How many tokens to generate at most.")] = 24,
    surface: Surface = "bridge",
    as_json: Json = False,
) -> None:
    """Let a model complete texts without and with clamped neurons.

    Example: `tl-flash clamp gpt2 L11N100=20 --prompt "My favourite animal is"`
    """
    from tl_flash import clamp as clamped
    from tl_flash import loading
    from tl_flash.experiments import complete_text

    values = dict(_neuron_value(text) for text in neurons)
    loaded = loading.load(model, surface)
    before = [complete_text(loaded, text, new_tokens) for text in prompt]
    with clamped(loaded, values, mode=mode, positions=positions):  # pyright: ignore[reportArgumentType]
        after = [complete_text(loaded, text, new_tokens) for text in prompt]
    records = [
        dict(zip(("prompt", "before", "after"), row, strict=True)) for row in zip(prompt, before, after, strict=True)
    ]
    if as_json:
        typer.echo(json.dumps(records, ensure_ascii=False))
        return
    for record in records:
        typer.echo(f"{record['prompt']!r}\n  before: {record['before'].strip()}\n  after:  {record['after'].strip()}")


@app.command()
def validate(
    model: ModelName,
    map: MapPath,
    n: Count = 50,
    by: By = "z",
    controls: Annotated[int, typer.Option(help="Matched random neurons a neuron.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the draw of controls.")] = 0,
    surface: Surface = "bridge",
    as_json: Json = False,
) -> None:
    """Clamp the most specialised neurons of a map and see whether their labels are raised.

    Example: `tl-flash validate gpt2 gpt2.safetensors -n 20`
    """
    from tl_flash import loading
    from tl_flash import validate as validated

    hits = _load(map).specialised(n, by=by)
    result = validated(loading.load(model, surface), hits, controls=controls, seed=seed)
    _print([result], as_json)


@app.command()
def report(
    maps: Annotated[list[Path], typer.Argument(metavar="MAP...", help="Maps of one model, one a side.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the page.")] = Path("report.html"),
    compare: Annotated[
        list[Path] | None, typer.Option(help="Another model's map; give it again for more sides.")
    ] = None,
    validation: Annotated[list[Path] | None, typer.Option(help="What `tl-flash validate --json` printed.")] = None,
    figures: Annotated[bool, typer.Option(help="Carry figures, and plotly to draw them.")] = True,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
) -> None:
    """Write the explorer: one HTML page that searches maps and needs no network.

    Example: `tl-flash report base.safetensors --compare instruct.safetensors -o base.html`
    """
    import pandas as pd

    import tl_flash
    from tl_flash import report as explorer

    loaded = [_load(path) for path in maps]
    sides = {map.side: map for map in loaded}
    others = [_load(path) for path in compare or ()]
    page = explorer.write(
        loaded,
        out,
        compare=[tl_flash.compare(sides.get(other.side, loaded[0]), other) for other in others],
        validation=[pd.DataFrame(json.loads(path.read_text())) for path in validation or ()],
        figures=None if figures else (),
        title=title,
    )
    typer.echo(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")


@app.command()
def bench(
    neurons: Annotated[int, typer.Option(help="Directions to decode.")] = 2048,
    d_model: Annotated[int, typer.Option(help="Width of the residual stream.")] = 768,
    d_vocab: Annotated[int, typer.Option(help="Tokens.")] = 50257,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each is timed.")] = 3,
    as_json: Json = False,
) -> None:
    """Time a decode of random weights beside the matrix product alone and the plain definition, on this machine.

    Example: `tl-flash bench --d-model 2048 --d-vocab 128256 --dtype bfloat16`
    """
    from tl_flash.bench import bench as measure

    frame = measure(neurons, d_model, d_vocab, dtype=dtype, device=device, rounds=rounds)
    if as_json:
        typer.echo(json.dumps([_jsonable(record) for record in frame.to_dict("records")]))
    else:
        typer.echo(frame.to_string(index=False, float_format="{:.3g}".format, na_rep=""))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 for a refusal (told in one line), 2 for wrong usage, 130 when interrupted.
    """
    try:
        app(args=argv, prog_name="tl-flash")
    except SystemExit as end:
        return int(end.code or 0)
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _load(path: Path) -> NeuronMap:
    from tl_flash import NeuronMap

    return NeuronMap.load(path)


def _print(results: Sequence[Hits | NeuronReading | Validation], as_json: bool) -> None:
    """Print tables, or one JSON list of records."""
    if not as_json:
        typer.echo("\n\n".join(map(str, results)))
        return
    records = [record for result in results for record in result.to_frame().to_dict("records")]
    typer.echo(json.dumps([_jsonable(record) for record in records], ensure_ascii=False))


def _neuron_value(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"neurons: expected a neuron and its value, such as L3N17=8.0, got {text!r}") from None


def _jsonable(record: dict[Any, Any]) -> dict[str, Any]:
    """JSON knows no NaN: null stands for what does not exist, such as a probability under the cosine score."""
    return {str(name): None if value != value else value for name, value in record.items()}
