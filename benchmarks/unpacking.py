"""How fast quantised matrices become numbers: random parts of one matrix in each format, unpacked in memory.

    python -m benchmarks.unpacking

Rows are what a decode reads of a matrix that holds a neuron a row, columns what it reads of the others, a quarter of
them at a time. What a disk takes comes on top. Two runs are discarded; the best of three is told.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.measure import device_name
from tl_flash.weights.formats.dequantised import FORMATS
from tl_flash.weights.formats.packed import Boxes

SIZE, GROUP = 2048, 128


def integers(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(100, 140, shape, dtype=torch.uint8)


def cases() -> dict[str, tuple[str, dict, dict[str, Tensor]]]:
    """By what is shown, the format, its config and a matrix's parts."""
    groups, halves = SIZE // GROUP, torch.rand(SIZE // GROUP, SIZE).half()
    state = dict(blocksize=64, shape=[SIZE, SIZE])
    held = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
    four_bits = {
        "quant_state.bitsandbytes__nf4": held,
        "quant_map": torch.rand(16),
        "absmax": torch.rand(SIZE**2 // 64),
    }
    weights = dict(num_bits=4, type="int", group_size=GROUP)
    packed = dict(format="pack-quantized", config_groups=dict(group_0=dict(weights=weights)))
    float8, words = bytes_of(SIZE, SIZE).view(torch.float8_e4m3fn), integers(SIZE, SIZE // 8)
    return {
        "FP8": ("fp8", {}, dict(weight=float8, scale=torch.rand(SIZE // 128, SIZE // 128))),
        "MXFP4": ("mxfp4", {}, dict(blocks=bytes_of(1, SIZE, SIZE // 32, 16), scales=bytes_of(1, SIZE, SIZE // 32))),
        "GPTQ int4": (
            "gptq",
            dict(bits=4, group_size=GROUP),
            dict(qweight=integers(SIZE // 8, SIZE), qzeros=integers(groups, SIZE // 8), scales=halves),
        ),
        "AWQ int4": ("awq", dict(group_size=GROUP), dict(qweight=words, qzeros=words[:groups], scales=halves)),
        "compressed-tensors int4": (
            "compressed-tensors",
            packed,
            dict(packed=words, scale=halves.T, shape=torch.tensor([SIZE, SIZE])),
        ),
        "bitsandbytes NF4": ("bitsandbytes", {}, four_bits | dict(weight=bytes_of(SIZE**2 // 2, 1))),
        "bitsandbytes int8": (
            "bitsandbytes",
            {},
            dict(weight=bytes_of(SIZE, SIZE).view(torch.int8), SCB=torch.rand(SIZE)),
        ),
    }


def rate(method: str, config: Mapping, parts: Mapping[str, Tensor], columns: slice) -> float:
    """Numbers a second."""
    form, seconds = FORMATS[method](config), []
    boxes = Boxes(lambda _: form.stored(parts).unpack)
    for run in range(5):
        start = time.perf_counter()
        boxes.of(run)(slice(0, SIZE), columns)
        seconds.append(time.perf_counter() - start)
    return SIZE * (columns.stop - columns.start) / min(seconds[2:])


def main() -> None:
    torch.manual_seed(0)
    print(f"{device_name(torch.device('cpu'))}\n\n| format | rows, million numbers/s | columns |\n| --- | --- | --- |")
    for name, case in cases().items():
        rows, columns = (rate(*case, slice(0, stop)) / 1e6 for stop in (SIZE, SIZE // 4))
        print(f"| {name} | {rows:.0f} | {columns:.0f} |")


if __name__ == "__main__":
    main()
