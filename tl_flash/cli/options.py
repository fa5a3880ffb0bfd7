"""Arguments and options that several commands share, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tl_flash.evidence import Validation
    from tl_flash.maps import ConceptHits, Hits, NeuronMap, NeuronReading

MapPath = Annotated[Path, typer.Argument(metavar="MAP", help="A map that `tl-flash decode` wrote.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face name or a model folder.")]
Surface = Annotated[
    str | None,
    typer.Option(help="Load as bridge (TransformerBridge) or hooked (HookedTransformer); by default what is there."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Count = Annotated[int, typer.Option("-n", help="How many at most.")]
By = Annotated[str, typer.Option(help="Rank by z, prob, write or coherence.")]


def is_map(name: str) -> bool:
    """Whether a name is that of a map's file, and not of a model: its folder, its .gguf file, its name on the hub."""
    path = Path(name)
    return path.suffix == ".safetensors" or (path.is_file() and path.suffix != ".gguf")


def load_map(path: Path) -> NeuronMap:
    """Read a map."""
    from tl_flash.maps import NeuronMap

    return NeuronMap.load(path)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is none.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text file in UTF-8 ({error})") from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """What a command printed with --json.

    Raises:
        ValueError: something else.
    """
    try:
        records = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected what `--json` prints ({error})") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: expected what `--json` prints, a list of records")
    return records


def print_results(results: Sequence[Hits | ConceptHits | NeuronReading | Validation], as_json: bool) -> None:
    """Print tables, or one JSON list of records."""
    if not as_json:
        typer.echo("\n\n".join(map(str, results)))
        return
    records = [record for result in results for record in result.to_frame().to_dict("records")]
    typer.echo(json.dumps([jsonable(record) for record in records], ensure_ascii=False))


def jsonable(record: dict[Any, Any]) -> dict[str, Any]:
    """JSON knows no NaN: null stands for what does not exist, such as a probability under the cosine score."""
    return {str(name): None if value != value else value for name, value in record.items()}
