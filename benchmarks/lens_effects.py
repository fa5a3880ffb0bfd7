"""How well a write reading predicts what a clamp does, with and without the Jacobian lens, by layer and dose.

    python -m benchmarks.lens_effects MODEL [--surface bridge]

J comes from texts that the model writes itself; effects are measured on others. Random neurons of each layer are
clamped at every position to 1, 5 and 20 standard deviations of their hook_post; the effect is the change of the log-
probabilities at the last position, mean over the texts. The reading is correlated with it over the vocabulary.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from tl_flash import activation_stats, jacobian_lens, loading, models
from tl_flash.alone import answers_alone
from tl_flash.lens import JacobianLens
from tl_flash.neurons import Neuron
from tl_flash.progress import track
from tl_flash.prompts import Answers, Prompts

DOSES = (1.0, 5.0, 20.0)
RESULTS = Path(__file__).parent / "results"


def texts(model, count: int, length: int, seed: int) -> torch.Tensor:
    """Token ids [text, position], drawn from the model from its beginning-of-sequence token on."""
    torch.manual_seed(seed)
    start = model.to_tokens("")[:, :1].repeat(count, 1)
    return model.generate(
        start, max_new_tokens=length - 1, do_sample=True, stop_at_eos=False, verbose=False, return_type="tokens"
    )


def readings(model, layer: int, lens: JacobianLens) -> dict[str, torch.Tensor]:
    """Logits [neuron, d_vocab] of every write direction, vocabulary mean taken off, plain and through the lens."""
    weights = models.read(model)
    W_U = weights.W_U.detach().float()
    if weights.final_gain is not None:
        W_U = weights.final_gain[:, None] * W_U
    x = weights.directions(layer, "out")
    both = {"plain": x @ W_U, "lens": lens.carry(x, layer) @ W_U}
    return {name: scores - scores.mean(-1, keepdim=True) for name, scores in both.items()}


def measure(model, n_neurons: int, seed: int) -> pd.DataFrame:
    lens_texts, test_texts = texts(model, 48, 40, seed), texts(model, 24, 40, seed + 1)
    lens = jacobian_lens(model, lens_texts)
    prompts = Prompts.of(model, test_texts)
    stats = activation_stats(model, test_texts)
    before = Answers.of(model, prompts).log_probs
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for layer in range(len(model.blocks)):
        scores = readings(model, layer, lens)
        drawn = torch.randperm(stats.std.shape[1], generator=generator)[:n_neurons].tolist()
        clamps = [(index, dose) for index in drawn for dose in DOSES]
        values = [(neuron, dose * stats[neuron].std) for neuron, dose in ((Neuron(layer, i), d) for i, d in clamps)]
        answers = track(answers_alone(model, prompts, values), f"layer {layer}", None, total=len(values))
        for (index, dose), answer in zip(clamps, answers, strict=True):
            effect = (answer.log_probs - before).mean(0)
            raised = effect.topk(10).indices
            for name, score in scores.items():
                rows.append(
                    {
                        "layer": layer,
                        "dose_std": dose,
                        "reading": name,
                        "correlation": float(torch.corrcoef(torch.stack([score[index], effect]))[0, 1]),
                        "top_token_raised": float(score[index].argmax() in raised),
                    }
                )
    print(f"{lens!r}; relative standard error by layer {[round(e, 3) for e in lens.relative_error().tolist()]}")
    return pd.DataFrame(rows).groupby(["layer", "dose_std", "reading"], as_index=False).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face name or a model folder")
    parser.add_argument("--surface", default="bridge")
    parser.add_argument("--neurons", type=int, default=60, help="a layer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    frame = measure(loading.load(arguments.model, arguments.surface), arguments.neurons, arguments.seed)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"lens_effects_{Path(arguments.model).name}.csv"
    frame.to_csv(path, index=False, float_format="%.4f")
    table = frame.pivot(index="layer", columns=["dose_std", "reading"], values=["correlation", "top_token_raised"])
    print(table.to_string(float_format="{:.2f}".format))
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
