"""Memory and overlap of a decode straight from a checkpoint that need not fit in memory.

    python -m benchmarks.checkpoint [--gigabytes 8] [--layers 4] [--folder DIR]

Makes a folder of random bf16 tensors in Llama's layout (32 layers, d_vocab 32,000), decodes it, and removes it again.
Three runs over the same layers, the files put out of the page cache before each that reads: reading alone (all that is
done to weights before the engine has them), computing alone (the layers held in memory) and both. Resident memory is
sampled meanwhile, as the kernel counts it: anonymous pages, and mapped pages of files, which it may drop at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.measure import device_name
from tl_flash.decode.job import Job
from tl_flash.decode.neurons import options_of
from tl_flash.weights import Layer
from tl_flash.weights.formats.safetensors import INDEX

N_LAYERS, D_VOCAB, D_MODEL, MIB = 32, 32_000, 4096, 2**20


def main() -> None:
    """Make the folder, run, print, remove the folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--layers", type=int, default=N_LAYERS, help="decode the first so many of the 32 layers")
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint; by default among temporary files")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    room = shutil.disk_usage(folder).free
    if room < 1.2e9 * args.gigabytes:
        raise SystemExit(f"{folder}: {room / 1e9:.1f} GB free, too few for {args.gigabytes} GB")
    try:
        with multiprocessing.get_context("spawn").Pool(1) as maker:  # so that its memory is gone before any is measured
            d_mlp = maker.apply(make, (folder, args.gigabytes))
        report(folder, d_mlp, range(args.layers), torch.device(args.device))
    finally:
        shutil.rmtree(folder)


def make(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint, four layers a shard; returns the d_mlp that gives it this size."""
    attention, d_model = 4 * D_MODEL**2, D_MODEL
    d_mlp = int((gigabytes * 1e9 / 2 - 2 * D_VOCAB * d_model - N_LAYERS * attention) / (3 * N_LAYERS * d_model))
    if d_mlp < 1:
        least = 2 * (2 * D_VOCAB * d_model + N_LAYERS * attention) / 1e9
        raise ValueError(f"gigabytes: expected more than the {least:.1f} of everything but the MLPs, got {gigabytes}")
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=N_LAYERS,
        vocab_size=D_VOCAB,
        tie_word_embeddings=False,
    )
    (folder / "config.json").write_text(json.dumps(config))
    where: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name)
        where.update(dict.fromkeys(tensors, name))

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)

    drawn = {f"mlp.{name}_proj.weight": random(d_mlp, d_model) for name in ("up", "gate")}
    drawn["mlp.down_proj.weight"] = random(d_model, d_mlp)
    drawn |= {f"self_attn.{name}_proj.weight": random(d_model, d_model) for name in "qkvo"}
    gains = {name: torch.ones(d_model).bfloat16() for name in ("input_layernorm", "post_attention_layernorm")}
    drawn |= {f"{name}.weight": gain for name, gain in gains.items()}
    for first in range(0, N_LAYERS, 4):
        layers = range(first, first + 4)
        tensors = {
            f"model.layers.{layer}.{name}": tensor.roll(97 * layer, dims=-1).contiguous()
            for layer in layers
            for name, tensor in drawn.items()
        }
        write(f"model-{first // 4:05d}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": random(D_VOCAB, d_model), "lm_head.weight": random(D_VOCAB, d_model)}
    write("model-ends.safetensors", ends | {"model.norm.weight": torch.ones(d_model).bfloat16()})
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return d_mlp


def report(folder: Path, d_mlp: int, layers: range, device: torch.device) -> None:
    """Run and print."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{device_name(device)}; torch {torch.__version__}")
    print(f"{size / 1e9:.2f} GB on disk; d_model {D_MODEL}, d_mlp {d_mlp}; {len(layers)} of {N_LAYERS} layers decoded")
    forget(folder)
    with resident() as peak:
        start = time.perf_counter()
        job = Job.of(folder, options_of({"layers": layers, "device": device}))
        job.unembedding.covariance  # noqa: B018 - made once, at the first call
        print(f"prepared in {time.perf_counter() - start:.1f} s")
        forget(folder)
        start = time.perf_counter()
        for _ in job.run(job.units):
            pass
        both = time.perf_counter() - start
    layer_bytes = 2 * (3 * d_mlp * D_MODEL + 4 * D_MODEL**2)
    allowed = (2 + 4) * D_VOCAB * D_MODEL + 2 * layer_bytes + 512 * MIB
    print(
        f"resident at most {peak['all'] / MIB:.0f} MiB (anonymous {peak['RssAnon'] / MIB:.0f}, mapped files "
        f"{peak['RssFile'] / MIB:.0f}; {peak['before'] / MIB:.0f} before it began); allowed: W_U in two precisions "
        f"+ two layers + 512 MiB = {allowed / MIB:.0f} MiB: {'kept' if peak['all'] <= allowed else 'NOT KEPT'}"
    )
    forget(folder)
    start = time.perf_counter()
    for unit in job.units:
        job.read(unit)
    read = time.perf_counter() - start
    held = in_memory(job)
    start = time.perf_counter()
    for _ in held.run(held.units):
        pass
    compute = time.perf_counter() - start
    ratio = both / max(read, compute)
    print(
        f"reading alone {read:.1f} s, computing alone {compute:.1f} s, both {both:.1f} s: {ratio:.3f} of the larger "
        f"(allowed 1.15): {'kept' if ratio <= 1.15 else 'NOT KEPT'}"
    )


def in_memory(job: Job) -> Job:
    """The same job with its layers held in memory."""
    layers: dict[int, Layer] = {}
    for layer in job.layers:
        read = job.weights.layer(layer)
        names = ("W_in", "W_out", "gain_pre")
        layers[layer] = dataclasses.replace(read, W_gate=None, **{name: getattr(read, name).clone() for name in names})
    held = dataclasses.replace(job, weights=dataclasses.replace(job.weights, read_layer=layers.get, on_disk=False))
    held.unembedding.covariance  # noqa: B018
    return held


def forget(folder: Path) -> None:
    """Put files out of the page cache, so that they are read from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def resident(every: float = 0.01) -> Iterator[dict[str, int]]:
    """Bytes resident at most, sampled: anonymous, of files, and both at once."""
    peak, done = {"RssAnon": 0, "RssFile": 0, "all": 0}, threading.Event()

    def look() -> dict[str, int]:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss")]
        now = {name.rstrip(":"): 1024 * int(kib) for name, kib, _ in lines}
        return now | {"all": sum(now.values())}

    def watch() -> None:
        while not done.wait(every):
            now = look()
            for name in ("RssAnon", "RssFile", "all"):
                peak[name] = max(peak[name], now[name])

    peak["before"] = look()["all"]
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main()
