"""A decode into a file that may be killed at any moment and started again, by one process or by many.

Each unit of work, once done, is kept in a folder beside the output, written whole or not at all. The folder knows what
decode it belongs to, and goes when the map is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tl_flash import storage
from tl_flash.assembly import versions
from tl_flash.decode import plan
from tl_flash.distributed import ranks
from tl_flash.neuron_map import NeuronMap
from tl_flash.progress import track
from tl_flash.weights import MLPWeights, combined, digest
from tl_flash.work import Job, Part, Unit

FORMAT, VERSION = "tl_flash.Part", 1


def decode_to_file(
    model: Any,
    out: str | Path,
    *,
    device: str | torch.device | None = None,
    progress: bool | None = None,
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
        options: all others of `flash_decode`.

    Returns:
        The map; None in processes of torchrun other than the first.

    Raises:
        FileNotFoundError: no folder to write to; or what `flash_decode` raises.
        ValueError: the folder keeps parts of another model, of one that has changed since, or of other options; or
            what `flash_decode` raises.
        OSError: the parts cannot be written, for want of space for one; those before are kept.
        KeyboardInterrupt: with a message that says what is kept and how to go on.

    Example:
        >>> import os, tempfile
        >>> from tl_flash.resume import decode_to_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     neurons = decode_to_file(model, f"{folder}/map.safetensors", k=3)
        ...     os.listdir(folder)
        ['map.safetensors']
    """
    out = Path(out)
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder to write the map to")
    with ranks(device) as group:
        job = plan(model, device=group.device, **options)
        parts = Parts(out.with_name(f"{out.name}.parts"), job)
        try:
            if group.first:
                parts.begin()
            group.wait()
            parts.require_same()
            todo = group.agree(parts.missing())
            share = group.share(todo)
            for part in track(job.run(share), f'decoding "{job.side}"', progress, total=len(share)):
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


def _merge(job: Job, parts: Parts, out: Path) -> NeuronMap:
    neurons = job.assemble(map(parts.load, job.units))
    whole = parts.folder / "whole.safetensors"
    neurons.save(whole)
    os.replace(whole, out)
    shutil.rmtree(parts.folder)
    return neurons


class Parts:
    """A folder of finished units of one decode."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self._job = folder, job
        self._identity: dict[str, Any] = json.loads(json.dumps(_identity(job)))
        self._digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()

    def begin(self) -> None:
        """Make the folder, or take up the one that is there.

        Raises:
            ValueError: that one is of another decode.
        """
        self.folder.mkdir(exist_ok=True)
        if not self._plan.is_file() or (self._differ() and not any(self.folder.glob("layer*.safetensors"))):
            partial = self.folder / ".plan.partial"
            with partial.open("w") as file:
                json.dump(self._identity, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._plan)
        self.require_same()

    def require_same(self) -> None:
        """Refuse a folder of another decode.

        Raises:
            FileNotFoundError: it is not there, so that this machine does not share it.
            ValueError: it is of another decode; the message says what differs.
        """
        if not self._plan.is_file():
            raise FileNotFoundError(f"{self.folder}: expected the first process's folder; put it where all can see it")
        differ = self._differ()
        if differ:
            changes = "; ".join(f"{name} was {kept}, is {self._identity[name]}" for name, kept in differ.items())
            raise ValueError(
                f"{self.folder}: keeps finished parts of another decode ({changes}). Finish that one with its own "
                "model and options, or delete the folder to begin anew"
            )

    def _differ(self) -> dict[str, Any]:
        """What the folder is of, where that is something else."""
        kept = json.loads(self._plan.read_text())
        return {name: kept.get(name) for name in self._identity if kept.get(name) != self._identity[name]}

    def missing(self) -> list[Unit]:
        """Units that are not finished."""
        return [unit for unit in self._job.units if not self._finished(unit)]

    def count(self) -> int:
        """How many units are finished."""
        return sum(self._path(unit).is_file() for unit in self._job.units)

    def keep(self, part: Part) -> None:
        """Write a finished unit, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        header = {"plan": self._digest, "digest": part.digest, "repaired": part.repaired}
        try:
            storage.write(FORMAT, VERSION, header, part.tensors, self._path(part.unit))
        except OSError as error:
            raise OSError(
                f"{error}. The {self.count()} parts that were finished are kept in {self.folder}; "
                "make room, and the same command goes on from there"
            ) from error

    def load(self, unit: Unit) -> Part:
        """Read a finished unit.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is broken, or of another decode.
        """
        header, tensors = storage.read(FORMAT, VERSION, self._path(unit))
        if header["plan"] != self._digest:
            raise ValueError(f"{self._path(unit)}: a part of another decode; delete {self.folder} to begin anew")
        return Part(unit, header["digest"], header["repaired"], tensors)

    def _finished(self, unit: Unit) -> bool:
        try:
            self.load(unit)
        except (FileNotFoundError, ValueError):  # what is broken is done again
            return False
        return True

    @property
    def _plan(self) -> Path:
        return self.folder / "plan.json"

    def _path(self, unit: Unit) -> Path:
        return self.folder / f"layer{unit.layer}-neuron{unit.start}.safetensors"


def _identity(job: Job) -> dict[str, Any]:
    """Everything that a map's bytes depend on, but for the machine."""
    weights, vocab = job.weights, job.weights.vocab
    return {
        "model": weights.name,
        "class": weights.class_name,
        "weights": _of_weights(weights, job.layers) if weights.identity is None else weights.identity(),
        "unembedding": job.unembedding_digest,
        "vocabulary": hashlib.sha256(repr((vocab.d_vocab, vocab.strings)).encode()).hexdigest()[:32],
        "layers": job.layers,
        "side": job.side,
        "score": job.score,
        "k": job.k,
        "fold_ln": job.fold_ln,
        "tokens": job.tracked,
        "ignored": hashlib.sha256(repr(job.ignored).encode()).hexdigest()[:32],
        "lens": None if job.lens is None else job.lens.fingerprint,
        "precision": job.precision,
        "device": job.unembedding.device.type,
        "max_bytes": job.max_bytes,
        "versions": versions(),
    }


def _of_weights(weights: MLPWeights, layers: Sequence[int]) -> str:
    """A digest of all that is read of a model in memory."""
    gains = [weights.final_gain, *(g for layer in layers for g in _gains(weights, layer))]
    matrices = [weights.held(layer, side) for layer in layers for side in weights.sides]
    return combined([digest(gain[None]) for gain in gains if gain is not None] + [digest(each) for each in matrices])


def _gains(weights: MLPWeights, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    read = weights.layer(layer)
    return read.gain_pre, read.gain_post
