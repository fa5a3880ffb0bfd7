"""Kill a decode at random moments, start it again each time, and compare the map with an undisturbed one.

    python -m benchmarks.checkpoint_kills [--kills 20] [--seed 0]

Each start is the real command line in a process of its own, ended by SIGKILL at a moment drawn between its first sight
of the weights and its end; where a run ends before its kill, its map is compared, too, and the next starts anew.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

N_LAYERS, D_VOCAB, D_MODEL, D_MLP = 48, 8_000, 256, 1024


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        whole, out = folder / "undisturbed.safetensors", folder / "map.safetensors"
        took = finish(start(folder, whole), whole)
        print(f"undisturbed: {took:.2f} s from the first part to the end")
        kills = 0
        while kills < args.kills:
            process = start(folder, out)
            kept = begun(process, out)
            time.sleep(random.uniform(0, took))
            process.kill()
            killed = process.wait() == -9
            kills += killed
            parts = len(list(out.with_name(f"{out.name}.parts").glob("layer*")))
            print(f"kill {kills}: {kept} parts found, {parts} kept" if killed else "ended before it could be killed")
            if out.exists():
                same(out, whole)
                out.unlink()
        finish(start(folder, out), out)
        same(out, whole)
        print(f"{kills} kills: the same {out.stat().st_size} bytes; left beside it: {leftovers(folder)}")


def make(folder: Path) -> None:
    """Write a small random checkpoint in Llama's layout."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {"lm_head.weight": random(D_VOCAB, D_MODEL), "model.norm.weight": torch.ones(D_MODEL).bfloat16()}
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}mlp.{name}_proj.weight": random(D_MLP, D_MODEL) for name in ("up", "gate")}
        tensors[f"{prefix}mlp.down_proj.weight"] = random(D_MODEL, D_MLP)
        tensors[f"{prefix}post_attention_layernorm.weight"] = torch.ones(D_MODEL).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    sizes = dict(hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS, vocab_size=D_VOCAB)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]} | sizes))


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tl_flash", "decode", str(folder), "-o", str(out), "-k", "5"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def begun(process: subprocess.Popen[bytes], out: Path) -> int:
    """Wait until a run has taken up its folder of parts; returns how many parts it found there."""
    plan = out.with_name(f"{out.name}.parts") / "plan.json"
    found = len(list(plan.parent.glob("layer*")))
    if found:
        time.sleep(random.uniform(0, 4))  # the folder is there already: somewhere from import to decoding
        return found
    while not plan.exists() and process.poll() is None:
        time.sleep(1e-3)
    return found


def finish(process: subprocess.Popen[bytes], out: Path) -> float:
    """Seconds from the folder's making to the end."""
    begun(process, out)
    began = time.perf_counter()
    if process.wait() != 0:
        raise SystemExit(f"the command failed with status {process.returncode}")
    return time.perf_counter() - began


def same(out: Path, whole: Path) -> None:
    if out.read_bytes() != whole.read_bytes():
        raise SystemExit("the map differs from the undisturbed one")


def leftovers(folder: Path) -> list[str]:
    known = {"config.json", "model.safetensors", "map.safetensors", "undisturbed.safetensors"}
    return sorted({path.name for path in folder.iterdir()} - known)


if __name__ == "__main__":
    main()
