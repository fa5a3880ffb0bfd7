"""Kill a decode at random moments, start it again each time, and compare the map with an undisturbed one.

    python -m benchmarks.checkpoint_kills [--kills 20] [--seed 0]

Each start runs the command line in a process of its own (forked, so that nothing has to be imported again), ended by
SIGKILL at a moment drawn between its start and the time that a whole decode takes; where a run ends before its kill,
its map is compared, too, and the next starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tl_flash import decode_to_file  # noqa: F401 - imported before any fork
from tl_flash.cli import main as tl_flash

N_LAYERS, D_VOCAB, D_MODEL, D_MLP = 48, 2_000, 64, 256


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
        began = time.perf_counter()
        if ended(start(folder, whole)) != 0:
            raise SystemExit("the undisturbed decode failed")
        took = time.perf_counter() - began
        print(f"undisturbed: {took:.2f} s")
        kills = 0
        while kills < args.kills:
            found, process = kept(out), start(folder, out)
            time.sleep(random.uniform(0, took))
            os.kill(process, signal.SIGKILL)
            if ended(process) == -signal.SIGKILL:
                kills += 1
                print(f"kill {kills}: {found} parts found, {kept(out)} kept")
            if out.exists():
                same(out, whole)
                out.unlink()
        if ended(start(folder, out)) != 0:
            raise SystemExit("the last decode failed")
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


def start(folder: Path, out: Path) -> int:
    """Begin a decode; returns its process's id."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(tl_flash(["decode", str(folder), "-o", str(out), "-k", "5"]))
    return process


def ended(process: int) -> int:
    """Wait; the exit status, or the signal that ended it, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kept(out: Path) -> int:
    return len(list(out.with_name(f"{out.name}.parts").glob("layer*")))


def same(out: Path, whole: Path) -> None:
    if out.read_bytes() != whole.read_bytes():
        raise SystemExit("the map differs from the undisturbed one")


def leftovers(folder: Path) -> list[str]:
    known = {"config.json", "model.safetensors", "map.safetensors", "undisturbed.safetensors"}
    return sorted({path.name for path in folder.iterdir()} - known)


if __name__ == "__main__":
    main()
