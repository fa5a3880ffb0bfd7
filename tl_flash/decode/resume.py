"""A decode into a file that may be killed at any moment and started again, by one process or by many.

Each unit of work, once done, is kept in a folder beside the output, written whole or not at all. The folder knows what
decode it belongs to, and goes when the map is whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from tl_flash import artefacts
from tl_flash.decode.distributed import Ranks, ranks
from tl_flash.decode.job import Job
from tl_flash.decode.neurons import options_of
from tl_flash.decode.parts import Parts
from tl_flash.lens import JacobianLens, jacobian_lens
from tl_flash.maps import NeuronMap
from tl_flash.progress import track


def decode_to_file(
    model: Any,
    out: str | Path,
    *,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> NeuronMap | None:
    """Decode a model as `flash_decode` does and save the map, keeping what is finished on the way.

    Killed and called again with the same arguments, it goes on where it was, and the file has the same bytes as
    without the interruption. Started by ``torchrun``, the processes share the work, each on its own device, by way of
    the folder, which several machines must share.

    Args:
        model: as in `flash_decode`.
        out: the file. What is finished is kept in a folder beside it, whose name has ".parts" added.
        device: where to compute; under torchrun by default a CUDA device for each process, if there are any.
        progress: a bar; by default on a terminal or in a notebook.
        tokenizer: as in `flash_decode`.
        options: all others of `flash_decode`.

    Returns:
        The map; None in processes of torchrun other than the first.

    Raises:
        FileNotFoundError: no folder to write to; or what `flash_decode` raises.
        IsADirectoryError: a folder in the map's place.
        ValueError: the folder keeps parts of another model, of one that has changed since, or of other options; or
            what `flash_decode` raises.
        OSError: the parts cannot be written, for want of space for one; those before are kept.
        KeyboardInterrupt: with a message that says what is kept and how to go on.

    Example:
        >>> import os, tempfile
        >>> from tl_flash import decode_to_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     neurons = decode_to_file(model, f"{folder}/map.safetensors", k=3)
        ...     os.listdir(folder)
        ['map.safetensors']
    """
    out = Path(out)
    artefacts.require_place(out, "the map")
    with ranks(device) as group:
        folder = out.with_name(f"{out.name}.parts")
        if options.get("lens") == "auto":
            options = options | {"lens": _kept_lens(model, folder / "lens.safetensors", group, progress)}
        job = Job.of(model, options_of(options | {"device": group.device}), tokenizer=tokenizer)
        parts = Parts(folder, job)
        try:
            if group.first:
                parts.begin()
            group.wait()
            parts.require_same()
            share = [job.units[number] for number in group.share(group.agree(parts.missing()))]
            for part in track(job.run(share), f'decoding "{job.options.side}"', progress, total=len(share)):
                parts.keep(part)
            group.wait()
            if not group.first:
                return None
            return _merge(job, parts, out)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{parts.count()} of {len(job.units)} parts are done and kept in {parts.folder}; "
                "the same command goes on from there"
            ) from None


def _kept_lens(model: Any, path: Path, group: Ranks, progress: bool | None) -> JacobianLens:
    """The lens that the first process makes of all layers, and keeps for the others and for another start."""
    if group.first and not path.is_file():
        made = jacobian_lens(model, progress=progress)
        path.parent.mkdir(exist_ok=True)
        made.save(path)
    group.wait()
    return JacobianLens.load(path)


def _merge(job: Job, parts: Parts, out: Path) -> NeuronMap:
    neurons = job.assemble(map(parts.load, job.units))
    whole = parts.folder / "whole.safetensors"
    neurons.save(whole)
    os.replace(whole, out)
    shutil.rmtree(parts.folder)
    return neurons
