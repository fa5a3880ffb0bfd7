"""Which neurons keep their top token when a model is quantised, and are specialised ones safer?

    python -m benchmarks.quantisation [smollm2 | demo] [--types Q8_0,Q5_1,Q5_0,Q4_1,Q4_0,MXFP4] [--sides in,out]

All MLP matrices and the unembedding are quantised by the package `gguf` and dequantised again, as llama.cpp stores them
(which leaves norms alone); both maps are compared. The null is the agreement of neurons shuffled within their layers.
`gguf` quantises to no K-quants. SmolLM2 is to be had here only as a Q4_1 file, so it is on that grid already: its own
Q4_1 changes next to nothing, and what other types do comes on top.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from benchmarks.real_models import SMOLLM2
from tl_flash import NeuronMap, compare, demo, flash_decode

RESULTS = Path(__file__).parent / "results"
MLP = ("gate_proj", "up_proj", "down_proj")


def quantised(model: Any, name: str) -> dict[str, torch.Tensor]:
    """A Llama's state dict with its MLP matrices and its unembedding as they come back from this quantisation."""
    kind = GGMLQuantizationType[name]
    state = dict(model.state_dict())
    for key, held in state.items():
        if any(part in key for part in MLP) or key in ("lm_head.weight", "model.embed_tokens.weight"):
            rows = held.float().numpy()
            state[key] = torch.from_numpy(np.ascontiguousarray(dequantize(quantize(rows, kind), kind)))
    return state


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).float()


def row(plain: NeuronMap, packed: NeuronMap) -> dict[str, Any]:
    """Agreement of top tokens in all, by third of the depth, and of the least and most specialised quarter."""
    found = compare(plain, packed)
    thirds = zip(("first", "middle", "last"), np.array_split(found.by_layer.numpy(), 3), strict=True)
    quarters = found.by_specialisation(4)["agreement"].tolist()
    of_layers = {f"{name} third": float(part.mean()) for name, part in thirds}
    of_neurons = {"least specialised quarter": quarters[0], "most specialised quarter": quarters[-1]}
    return {"same top token": found.agreement} | of_layers | of_neurons | {"null": found.null}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = {"smollm2": SMOLLM2.folder, "demo": demo.path("base")}
    parser.add_argument("model", nargs="?", choices=folders, default="smollm2")
    parser.add_argument("--types", default="Q8_0,Q5_1,Q5_0,Q4_1,Q4_0,MXFP4")
    parser.add_argument("--sides", default="in,out")
    given = parser.parse_args()
    plain, rows = load(folders[given.model]), []
    maps = {side: flash_decode(plain, side=side) for side in given.sides.split(",")}
    for name in given.types.split(","):
        packed = load(folders[given.model])
        packed.load_state_dict(quantised(plain, name))
        for side, neurons in maps.items():
            rows.append({"type": name, "side": side} | row(neurons, flash_decode(packed, side=side)))
            print(rows[-1], flush=True)
    frame = pd.DataFrame(rows)
    RESULTS.mkdir(exist_ok=True)
    frame.to_csv(RESULTS / f"quantisation_{given.model}.csv", index=False, float_format="%.4f")
    print(frame.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
