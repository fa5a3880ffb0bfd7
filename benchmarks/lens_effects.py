"""How well readings of what neurons write predict what clamping them does, by layer and dose, beside the ceiling.

    python -m benchmarks.lens_effects MODEL [--neurons 16] [--layers 0,5,10,15,20,25,29] [--exact 8] [--code]

MODEL is a name, a folder, "base" (of the embedded pair) or "smollm2" and "gemma3" (`make models`). Effects are measured
by `check_lens` on texts that no lens was made of: of this folder, or for models that know few words, drawn from the
model or like its training texts. Seconds are of this machine as it was; where several works share it, they say
nothing. With `--cost` an estimate for Llama 3.1 8B, by counting alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import real_models
from benchmarks.lens_texts import CODE, PROSE
from tl_flash import JacobianLens, check_lens, demo, jacobian_lens, load_model
from tl_flash.lens import own_texts

RESULTS = Path(__file__).parent / "results"
REAL = {"smollm2": real_models.SMOLLM2, "gemma3": real_models.GEMMA3}
Texts = Sequence[str] | torch.Tensor | Sequence[torch.Tensor]


def drawn(model: Any, count: int, length: int, seed: int) -> torch.Tensor:
    """Token ids [text, position], drawn from the model from its beginning-of-sequence token on."""
    torch.manual_seed(seed)
    start = model.to_tokens("")[:, :1].repeat(count, 1)
    return model.generate(
        start, max_new_tokens=length - 1, do_sample=True, stop_at_eos=False, verbose=False, return_type="tokens"
    )


def of_model(name: str, surface: str, code: bool) -> tuple[Any, Texts | None, Texts]:
    """The model, texts to make lenses of (None: the package's own) and others to measure effects on."""
    if name in REAL:
        model = load_model(REAL[name].folder, surface=surface)
        return model, None, [model.to_tokens(text)[0, :32] for text in (CODE if code else PROSE)]
    if name in demo.MODELS:
        return demo.load(name, surface=surface), demo.texts(48), demo.texts(24, seed=1)
    model = load_model(name, surface=surface)
    return model, drawn(model, 48, 40, 0), drawn(model, 24, 40, 1)


def lenses(model: Any, texts: Texts | None, layers: Sequence[int] | None, exact: int) -> dict[str, JacobianLens]:
    """Each method's; with `exact` 0 the mean-field one alone."""
    made = {"mean_field": jacobian_lens(model, texts, layers=layers)}
    if exact:
        made["mixed"] = jacobian_lens(model, texts, layers=layers, method="mixed", exact_prompts=exact)
        every = own_texts(model).rows if texts is None else texts
        some = every[:: max(1, len(every) // exact)][:exact]
        made["exact"] = jacobian_lens(model, some, layers=layers, method="exact")
    for name, lens in made.items():
        errors = [round(error, 3) for error in lens.relative_error().tolist()]
        print(f"{name}: {lens.source.prompts} texts, {lens.source.seconds} s; relative standard error {errors}")
    return made


def table(frame: pd.DataFrame) -> str:
    """By layer and dose: the ceiling, each reading's correlation and its share of the ceiling."""
    columns = frame.pivot(index=["dose", "layer"], columns="reading", values=["correlation", "share", "top_raised"])
    ceiling = frame.groupby(["dose", "layer"])["ceiling"].first()
    columns.insert(0, ("", "ceiling"), ceiling)
    return columns.to_string(float_format="{:.2f}".format)


def cost() -> str:
    """Of Llama 3.1 8B and 64 texts of 60 tokens: floating-point operations, by counting products of matrices."""
    layers, d_model, d_mlp, heads, kv_heads, d_head, tokens = 32, 4096, 14336, 32, 8, 128, 64 * 60
    attention = 2 * d_model * d_head * (heads + kv_heads)
    weights = layers * (attention + 3 * d_model * d_mlp)
    forward = 2 * weights * tokens
    a_layer = 2 * tokens * (3 * d_model * d_mlp + d_model**2 + 2 * d_model * heads * d_head)  # (a n X), n n', v n'
    matrices = 2 * 8 * d_model**2 * (d_mlp + heads * d_head)  # a batch of 8 texts: W_out diag(a) X and W_O core
    chains = 3 * 2 * 2 * d_model**3
    mean_field = forward + layers * (a_layer + matrices + chains)
    exact = d_model * 2 * weights * tokens
    return (
        f"an estimate for Llama 3.1 8B, 64 texts of 60 tokens, by counting: mean-field {mean_field:.1e} FLOP, "
        f"{mean_field / 790e12:.1f} s at the 790 TFLOP/s of a bf16 product on an H100; exact {exact:.1e} FLOP, "
        f"{exact / 790e12:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a name, a folder, base, smollm2 or gemma3")
    parser.add_argument("--surface", default="bridge")
    parser.add_argument("--neurons", type=int, default=16, help="a layer")
    parser.add_argument("--layers", type=lambda text: [int(each) for each in text.split(",")], help="such as 0,10,20")
    parser.add_argument("--doses", type=lambda text: [float(each) for each in text.split(",")], default=[1.0, 5.0])
    parser.add_argument("--exact", type=int, default=8, help="texts of the exact lens; 0 leaves it and the mixed out")
    parser.add_argument("--code", action="store_true", help="measure effects on code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true")
    arguments = parser.parse_args()
    if arguments.cost or arguments.model is None:
        print(cost())
        return
    model, texts, tested = of_model(arguments.model, arguments.surface, arguments.code)
    made = lenses(model, texts, arguments.layers, arguments.exact)
    frame = check_lens(model, made, tested, n=arguments.neurons, doses=arguments.doses, seed=arguments.seed)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"lens_effects_{Path(arguments.model).name}{'_code' * arguments.code}.csv"
    frame.to_csv(path, index=False, float_format="%.4f")
    print(table(frame))
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
