"""The command that serves the live explorer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tl_flash.cli.options import Surface, is_map, load_map, read_text

if TYPE_CHECKING:
    from tl_flash.maps import NeuronMap

DEMO_TEXTS = 60
"""Texts of the embedded models' own kind, on which their neurons' ranges are measured."""


def explore(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A Hugging Face name, a model folder or a .gguf file; without, the embedded model."
        ),
    ] = None,
    maps: Annotated[
        list[Path] | None, typer.Argument(metavar="[MAP]...", help="Sides of it that are decoded; the others will be.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen; 0 for a free one.", min=0, max=65535)] = 0,
    token: Annotated[str | None, typer.Option(help='What whoever opens the page has to know; "new" makes one.')] = None,
    side: Annotated[
        list[str] | None, typer.Option(help="A side to decode, in, gate or out; give it again. By default all.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="A text file, a text a line, to measure neurons' ranges on.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    surface: Surface = None,
) -> None:
    """Serve the live explorer: ask the model, find neurons, clamp them, and read both answers side by side.

    It needs `pip install "tl_flash[explore]"`. Ctrl-C, or closing the terminal, stops it.

    Example: `tl-flash explore HuggingFaceTB/SmolLM2-135M-Instruct`
    """
    from tl_flash import demo, load_model
    from tl_flash.explore import apart, require_extra, require_safe, serve

    require_extra()
    require_safe(host, token)
    if model is not None and is_map(model):
        raise ValueError(
            f"MODEL: expected a model before its maps, got {model}; a map alone is shown by tl-flash report"
        )
    lines = None if texts is None else [line for line in read_text(texts).splitlines() if line.strip()]
    if texts is not None and not lines:
        raise ValueError(f"--texts: expected a text a line, got none in {texts}")

    def load() -> tuple[Any, list[NeuronMap]]:
        given = [load_map(path) for path in maps or ()]
        if model is not None:
            return load_model(model, surface=surface), given
        embedded: Any = demo.load("instruct", surface=surface)
        embedded.tokenizer.chat_template = demo.CHAT_TEMPLATE
        return embedded, given

    loaded, given = apart(load)
    if model is None:
        lines = lines or demo.texts(DEMO_TEXTS)
    try:
        serve(
            loaded,
            given,
            host=host,
            port=port,
            token=token,
            sides=side,
            texts=lines,
            browser=browser,
            say=lambda address: typer.echo(f"the live explorer is at {address} (Ctrl-C stops it)"),
        )
    except KeyboardInterrupt:
        typer.echo("stopped")
