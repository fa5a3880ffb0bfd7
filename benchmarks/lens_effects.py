"""How well readings of what neurons write predict what clamping them does, by layer and dose, beside the ceiling.

    python -m benchmarks.lens_effects MODEL [--code] [--keep FOLDER] [--neurons 16] [--exact 8] [--layers 0,10,20]

MODEL is a name, a folder, "base" (of the embedded pair) or "smollm2" and "gemma3" (`make models`). Effects are measured
by `check_lens` on texts that no lens was made of: of this folder, or for models that know few words, drawn from the
model or like its training texts; with `--code` on code, beside a lens of code. The exact lens takes far longer than all
else, so `--keep` writes the lenses to a folder, or reads them there and says so. Seconds are of this machine as it was;
where several works share it, they say nothing. With `--cost` an estimate for Llama 3.1 8B, by counting alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import real_models
from benchmarks.lens_texts import CODE, PROSE
from tl_flash import JacobianLens, check_lens, demo, jacobian_lens, load_model
from tl_flash.clamps import Prompts
from tl_flash.lens import own_texts
from tl_flash.lens.estimate import Estimate
from tl_flash.lens.mixed import mix, spread
from tl_flash.lens.texts import TEXTS
from tl_flash.weights import read

OWN_CODE = [text for text in TEXTS if "\n  " in text or text.startswith("SELECT")]
"""Code among the texts that the package makes a lens of; none of it is measured on."""
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


def over_the_depth(n_layers: int) -> list[int]:
    """Seven layers, the first and the last among them."""
    return sorted({*(i * n_layers // 6 for i in range(6)), n_layers - 1})


def lenses(
    model: Any, texts: Texts | None, layers: Sequence[int], n_exact: int, keep: Path | None, code: bool
) -> Iterator[tuple[str, JacobianLens]]:
    """Each method's by its name, as it is made; with `n_exact` 0 the mean-field one alone, or two of them for code.

    The exact mean of some texts is made in two halves, since the mixed lens needs both.
    """

    def made(name: str, prompts: Texts | None, **options: Any) -> JacobianLens:
        path = keep / f"{name}.safetensors" if keep else None
        if path and path.is_file():
            print(f"{name}: read from {path}", flush=True)
            return JacobianLens.load(path)
        lens = jacobian_lens(model, prompts, layers=layers, progress=True, **options)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            lens.save(path)
        return lens

    field = made("mean_field", texts)
    yield "mean_field", field
    if code:
        yield "mean_field of code", made("mean_field_of_code", OWN_CODE)
    if not n_exact:
        return
    all_texts = own_texts(model) if texts is None else Prompts.of(model, texts)
    some = spread(all_texts, n_exact)
    of_all = made("mean_field_of_all", list(all_texts.rows)) if texts is None else field
    exact, fields = (
        [made(f"{method}_{i}", some[i::2], method=method) for i in range(2)] for method in ("exact", "mean_field")
    )
    weights, seconds = read(model), sum(float(half.source.seconds or 0) for half in exact)
    tokens = sum(int(half.source.tokens or 0) for half in exact)
    mean = Estimate((exact[0].J + exact[1].J) / 2, (exact[0].J - exact[1].J).abs() / 2, n_exact, tokens)
    yield "exact", JacobianLens.with_papers(mean, weights, layers, "exact", seconds)
    seconds += sum(float(lens.source.seconds or 0) for lens in (of_all, *fields))
    both = mix(weights, layers, _estimate(of_all), [*map(_estimate, exact)], [*map(_estimate, fields)])
    yield "mixed", JacobianLens.with_papers(both, weights, layers, "mixed", seconds)


def _estimate(lens: JacobianLens) -> Estimate:
    return Estimate(lens.J, lens.stderr, lens.source.prompts, lens.source.tokens)


def tables(frame: pd.DataFrame) -> str:
    """By dose and layer of each reading: its share of the ceiling; whether its top token is one of the ten raised."""
    ceiling = frame.groupby(["dose", "layer"])["ceiling"].first()
    parts = []
    for column, title in (("share", "share of the ceiling"), ("top_raised", "top token among the ten raised most")):
        columns = frame.pivot(index=["dose", "layer"], columns="reading", values=column)
        columns = columns.reindex(columns=list(dict.fromkeys(frame["reading"])))
        columns.insert(0, "ceiling", ceiling)
        parts.append(f"{title}\n{columns.to_string(float_format='{:.2f}'.format)}")
    return "\n\n".join(parts)


def cost() -> str:
    """Of Llama 3.1 8B and 16 texts of 32 tokens: floating-point operations, by counting products of matrices."""
    layers, d_model, d_mlp, heads, kv_heads, d_head, texts = 32, 4096, 14336, 32, 8, 128, 16
    tokens = texts * 32
    attention = 2 * d_model * d_head * (heads + kv_heads)
    weights = layers * (attention + 3 * d_model * d_mlp)
    forward = 2 * weights * tokens
    a_token = 2 * tokens * (3 * d_model**2 + d_model * d_mlp + 2 * d_model * heads * d_head)
    # W_out' diag(a) X and J B for both classes, W_O' core and J A for their four pairs
    a_text = 2 * texts * d_model**2 * (2 * (d_mlp + d_model) + 4 * (heads * d_head + d_model))
    mean_field = forward + layers * (a_token + a_text)
    exact = d_model * 2 * weights * tokens
    memory = layers * d_model**2 * (2 * 8 + 6 * 4)  # sums, a text's factors
    return (
        f"an estimate for Llama 3.1 8B, {texts} texts of 32 tokens, by counting: mean-field {mean_field:.1e} FLOP, "
        f"in float32, {mean_field / 67e12:.0f} s at the 67 TFLOP/s of an H100's data sheet; exact {exact:.1e} FLOP, "
        f"{exact / 790e12:.0f} s at the 790 TFLOP/s of a bf16 product; beside the model {memory / 1e9:.0f} GB, however "
        "many texts"
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
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the lenses lie, or are put")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true")
    given = parser.parse_args()
    if given.cost or given.model is None:
        print(cost())
        return
    model, texts, tested = of_model(given.model, given.surface, given.code)
    layers = given.layers or over_the_depth(model.cfg.n_layers)
    made = {}
    for name, lens in lenses(model, texts, layers, given.exact, given.keep, given.code):
        errors = " ".join(f"{error:.3f}" for error in lens.relative_error().tolist())
        source = lens.source
        print(
            f"{name}: {source.prompts} texts, {source.seconds} s; standard error by layer, of J: {errors}", flush=True
        )
        made[name] = lens
    frame = check_lens(
        model, made, tested, n=given.neurons, doses=given.doses, layers=layers, seed=given.seed, progress=True
    )
    seconds = {"plain": 0.0} | {name: lens.source.seconds for name, lens in made.items()}
    frame = frame.assign(seconds=frame["reading"].map(seconds), texts=len(tested))
    path = RESULTS / f"lens_effects_{Path(given.model).name}{'_code' * given.code}.csv"
    frame.to_csv(path, index=False, float_format="%.4f")
    print(tables(frame))
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
