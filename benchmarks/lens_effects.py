"""How well a write reading predicts what a clamp does, with and without the Jacobian lens, by layer and dose.

    python -m benchmarks.lens_effects MODEL [--surface bridge]

J comes from texts that the model writes itself; effects are measured on others, by `check_lens`. With `--explain` the
same by what J was made from (more texts, the very texts that effects are measured on) and at a dose near zero.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from tl_flash import check_lens, jacobian_lens, load_model
from tl_flash.clamps import Mode

DOSES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
RESULTS = Path(__file__).parent / "results"


def texts(model, count: int, length: int, seed: int) -> torch.Tensor:
    """Token ids [text, position], drawn from the model from its beginning-of-sequence token on."""
    torch.manual_seed(seed)
    start = model.to_tokens("")[:, :1].repeat(count, 1)
    return model.generate(
        start, max_new_tokens=length - 1, do_sample=True, stop_at_eos=False, verbose=False, return_type="tokens"
    )


def measure(model, neurons: int, seed: int) -> pd.DataFrame:
    """The table of all layers, doses and both readings."""
    lens = jacobian_lens(model, texts(model, 48, 40, seed))
    errors = [round(error, 3) for error in lens.relative_error().tolist()]
    print(f"{lens!r}; relative standard error by layer {errors}")
    return check_lens(model, lens, texts(model, 24, 40, seed + 1), n=neurons, doses=DOSES)


def explain(model, neurons: int, seed: int) -> pd.DataFrame:
    """Correlations through the lens by what J was made from: clamps to 5 standard deviations, and 0.01 of one added."""
    tested = texts(model, 24, 40, seed + 1)
    sources = {
        "48 texts": texts(model, 48, 40, seed),
        "192 texts": texts(model, 192, 40, seed + 2),
        "the texts tested": tested,
        "one text, tested on it": tested[:1],
    }
    trials: tuple[tuple[float, Mode], ...] = ((0.01, "add"), (5.0, "set"))
    parts = []
    for name, source in sources.items():
        lens = jacobian_lens(model, source)
        on = tested[:1] if len(source) == 1 else tested
        for dose, mode in trials:
            frame = check_lens(model, lens, on, n=neurons, doses=(dose,), mode=mode)
            parts.append(frame.assign(J=name, clamp=f"{mode} {dose:g} std"))
    frame = pd.concat(parts)
    return frame[frame["reading"] == "lens"].pivot_table(index="layer", columns=["clamp", "J"], values="correlation")


def cost(model, seed: int) -> str:
    """Time of one sweep for all layers over that of the plain loop, a lens a layer."""
    tokens, layers = texts(model, 8, 40, seed), range(len(model.blocks))

    def timed(work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    rounds = [
        (
            timed(lambda: jacobian_lens(model, tokens)),
            timed(lambda: [jacobian_lens(model, tokens, layers=[layer]) for layer in layers]),
        )
        for _ in range(3)
    ]
    sweep, loop = (sorted(part)[1] for part in zip(*rounds, strict=True))
    d_model, inner = 4096, 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    flop = d_model * 2 * inner * 48 * 40
    return (
        f"all {len(layers)} layers from one sweep {sweep:.2f} s, a loop over layers {loop:.2f} s: "
        f"{loop / sweep:.1f} times\n"
        f"an estimate for Llama 3.1 8B, 48 texts of 40 tokens: d_model backward passes of 2 FLOP a weight and token, "
        f"{flop:.1e} FLOP, {flop / 790e12:.0f} s at the 790 TFLOP/s of a bf16 product on an H100"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face name or a model folder")
    parser.add_argument("--surface", default="bridge")
    parser.add_argument("--neurons", type=int, default=60, help="a layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--explain", action="store_true", help="where the lens falls short: texts, mean or dose")
    parser.add_argument("--cost", action="store_true", help="time one sweep against a loop over layers")
    arguments = parser.parse_args()
    model = load_model(arguments.model, surface=arguments.surface)
    if arguments.cost:
        print(cost(model, arguments.seed))
        return
    if arguments.explain:
        print(explain(model, arguments.neurons, arguments.seed).to_string(float_format="{:.2f}".format))
        return
    frame = measure(model, arguments.neurons, arguments.seed)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"lens_effects_{Path(arguments.model).name}.csv"
    frame.to_csv(path, index=False, float_format="%.4f")
    table = frame.pivot(index="layer", columns=["dose", "reading"], values=["correlation", "top_raised"])
    print(table.to_string(float_format="{:.2f}".format))
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
