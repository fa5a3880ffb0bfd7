"""Safetensors of a quantised model, under the names and shapes that the model has: dequantised when they are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tl_flash.weights.files import Files
from tl_flash.weights.formats.awq import AWQ
from tl_flash.weights.formats.bitsandbytes import BitsAndBytes
from tl_flash.weights.formats.compressed_tensors import CompressedTensors
from tl_flash.weights.formats.fp8 import FP8
from tl_flash.weights.formats.gptq import GPTQ
from tl_flash.weights.formats.mxfp4 import MXFP4
from tl_flash.weights.formats.packed import Boxes, Packed
from tl_flash.weights.formats.quantised import Format, Parts, Stored
from tl_flash.weights.formats.safetensors import Opened, Shards

FORMATS: dict[str, type[Format]] = {
    "fp8": FP8,
    "fbgemm_fp8": FP8,
    "mxfp4": MXFP4,
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": BitsAndBytes,
}
"""By `quant_method` in config.json."""
_WHOLE = (torch.bool, torch.int64)
"""Of buffers, which nothing quantises."""
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def tensors_of(files: Files) -> Shards | QuantisedShards:
    """The safetensors of a checkpoint, dequantised where its config.json says that they are quantised.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: a quantisation that is not known.
    """
    config = files.json("config.json")
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if not quantisation:
        return Shards(files)
    if not isinstance(quantisation, dict):
        raise ValueError(f"config.json: quantization_config is {quantisation!r}, expected an object; fetch it again")
    in_bits = quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit")
    method = quantisation.get("quant_method", "bitsandbytes" if in_bits else None)
    if method not in FORMATS:
        raise ValueError(
            f"{files.checkpoint}: quantised by {method!r} (quant_method in config.json), expected one of "
            f"{', '.join(FORMATS)}; take the unquantised model, or another quantisation of it"
        )
    try:
        return QuantisedShards(files, FORMATS[method](quantisation))
    except TypeError as error:  # a value of another kind than the format has there
        raise ValueError(f"config.json: no quantization_config of {method} ({error}); fetch it again") from error
    except ValueError as error:
        raise ValueError(
            f"{files.checkpoint}: quantised by {method}, whose {error}; take the unquantised model, or another "
            "quantisation of it"
        ) from error


class QuantisedShards:
    """What `Shards` is to tensors that are not quantised."""

    def __init__(self, files: Files, form: Format) -> None:
        self._shards, self.form = Shards(files), form
        self.boxes = Boxes(lambda name: self.opened().stored(name).unpack)

    @cached_property
    def parts(self) -> dict[str, Parts]:
        """Of every quantised tensor."""
        return self.form.parts(self._shards.where)

    @cached_property
    def where(self) -> dict[str, str]:
        """The file of every tensor, by the name that the model has for it."""
        raw = self._shards.where
        hidden = {part for parts in self.parts.values() for part in parts.values()}
        own = {name: raw[next(iter(parts.values()))] for name, parts in self.parts.items()}
        return {name: file for name, file in raw.items() if name not in hidden} | own

    def opened(self) -> Dequantised:
        """The tensors, each file opened at most once."""
        return Dequantised(self, self._shards.opened())

    def quantisation(self, names: Iterable[str]) -> str | None:
        """How these are quantised, such as "GPTQ int4", the most frequent first; None where none is."""
        kinds = Counter(self.form.label(self.parts[name]) for name in names if name in self.parts)
        return " and ".join(kind for kind, _ in kinds.most_common()) or None


class Dequantised(Mapping[str, Tensor]):
    """Tensors by name; quantised ones are `Packed`, and none is read before its numbers are used."""

    def __init__(self, shards: QuantisedShards, raw: Opened) -> None:
        self._shards, self._raw = shards, raw

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shards.parts:
            return self._raw[name]
        stored = self.stored(name)
        packed = Packed.of(stored.shape, self._shards.boxes.of(name))
        return packed.mT if stored.transposed else packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards.where)

    def __len__(self) -> int:
        return len(self._shards.where)

    def __contains__(self, name: object) -> bool:
        return name in self._shards.where

    def stored(self, name: str) -> Stored:
        """A quantised tensor.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a part of it is missing, or does not fit the others.
        """
        parts = self._shards.parts[name]
        file, given = self._shards.where[name], {part: self._raw[own] for part, own in parts.items()}
        try:
            return self._shards.form.stored(given)
        except KeyError as error:
            raise ValueError(
                f"{file}: {name} is quantised ({self._shards.form.label(parts)}), but its {error.args[0]} is missing; "
                "fetch the checkpoint again"
            ) from error
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{file}: {name} {error}; fetch the checkpoint again") from error

    def require(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse tensors that are missing, of another shape, or quantised without what they are scaled by.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: one is.
        """
        for name, shape in shapes.items():
            file = self._shards.where.get(name)
            if name in self._shards.parts:
                given = self.stored(name).held
                if given != shape:
                    raise ValueError(
                        f"{file}: {name} is {given}, expected {shape} by config.json; check that both are of one "
                        "model, and fetch them again"
                    )
                continue
            self._raw.require({name: shape})
            self._require_plain(name)

    def in_memory(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors, dequantised one after the other.

        Args:
            dtype: of what is quantised or a float.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a tensor's parts are missing, or do not fit together.
        """
        held = {}
        for name in self:
            if name in self._shards.parts:
                held[name] = self[name].clone().to(dtype)
            else:
                self._require_plain(name, _PLAIN + _WHOLE)
                held[name] = self[name].to(dtype) if self[name].is_floating_point() else self[name].clone()
        return held

    def _require_plain(self, name: str, dtypes: Sequence[torch.dtype] = _PLAIN) -> None:
        dtype = self._raw[name].dtype
        if dtype not in dtypes:
            raise ValueError(
                f"{self._shards.where[name]}: {name} is {dtype}, whose scales are missing, or which is quantised "
                "in another way than config.json says; fetch the checkpoint again"
            )
