"""A folder of finished units of one decode, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tl_flash import artefacts
from tl_flash.decode.assembly import versions
from tl_flash.decode.job import Job
from tl_flash.decode.units import Part, Unit
from tl_flash.weights import MLPWeights, combined, digest

FORMAT, VERSION = "tl_flash.Part", 1


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
            with partial.open("w", encoding="utf-8") as file:
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
        kept = json.loads(self._plan.read_text(encoding="utf-8"))
        return {name: kept.get(name) for name in self._identity if kept.get(name) != self._identity[name]}

    def missing(self) -> list[int]:
        """Which of the job's units are not finished."""
        return [number for number, unit in enumerate(self._job.units) if not self._finished(unit)]

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
            artefacts.write(FORMAT, VERSION, header, part.tensors, self._path(part.unit))
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
        header, tensors = artefacts.read(FORMAT, VERSION, self._path(unit))
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
    weights, vocab, options = job.weights, job.weights.vocab, job.options
    return {
        "model": weights.name,
        "class": weights.class_name,
        "weights": _of_weights(weights, job.layers) if weights.identity is None else weights.identity(),
        "unembedding": job.unembedding_digest,
        "vocabulary": hashlib.sha256(repr((vocab.d_vocab, vocab.strings)).encode()).hexdigest()[:32],
        "layers": job.layers,
        "side": options.side,
        "score": options.score,
        "k": options.k,
        "fold_ln": options.fold_ln,
        "tokens": job.tracked,
        "ignored": hashlib.sha256(repr(job.ignored).encode()).hexdigest()[:32],
        "lens": None if job.lens is None else job.lens.fingerprint,
        "precision": options.precision,
        "device": job.unembedding.device.type,
        "max_bytes": options.max_bytes,
        "versions": versions(),
    }


def _of_weights(weights: MLPWeights, layers: Sequence[int]) -> str:
    """A digest of all that is read of a model in memory."""
    gains = [weights.final_gain, *(g for layer in layers for g in _gains(weights, layer))]
    matrices = [weights.held(layer, side) for layer in layers for side in weights.sides]
    return combined([digest(gain[None]) for gain in gains if gain is not None] + [digest(each) for each in matrices])


def _gains(weights: MLPWeights, layer: int) -> tuple[torch.Tensor | None, ...]:
    read = weights.layer(layer)
    return read.gain_pre, read.gain_post, read.gain_neurons
