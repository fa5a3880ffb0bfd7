"""Do the embedded model's write neurons raise the concepts that label them, and do like neurons not?

    python -m benchmarks.concept_clamps [--dose 5]

For every concept that labels a specialised neuron by its write direction (side "out"), the neuron of the largest
z-score is clamped to `dose` times its max|hook_post| over 400 documents of the corpus, with the sign of its pole. The
change of the word's log-probability is taken after each of twenty neutral prompts, for the neuron and for 20 controls:
neurons of the same layer of about the same ||W_out||, clamped to the same value.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from tl_flash import Neuron, activation_stats, demo, flash_decode
from tl_flash.clamps import Answers, Prompts, answers_alone
from tl_flash.demo.tour import named_concepts
from tl_flash.evidence import Peers
from tl_flash.progress import track
from tl_flash.weights import read

NATS = 2.0
RESULTS = Path(__file__).parent / "results"


def measure(dose: float, controls: int = 20) -> pd.DataFrame:
    """A row a concept: its neuron, the mean change, and the share of prompts where it is at least NATS."""
    model = demo.load("base")
    neurons = flash_decode(model, side="out")
    prompts = Prompts.of(model, demo.NEUTRAL_PROMPTS)
    stats = activation_stats(model, demo.texts(400))
    before = Answers.of(model, prompts).log_probs
    peers = Peers(read(model), controls, seed=0)
    rows = []
    for word, hit in track(list(named_concepts(neurons).items()), "clamping", None):
        clamped = Neuron.of(hit.neuron)
        value = dose * stats[hit.neuron].abs_max * (1 if hit.pole == "positive" else -1)
        clamps = [(neuron, value) for neuron in (clamped, *peers.of(clamped))]
        token = neurons.vocab.id(hit.token)
        own, *others = ((a.log_probs - before)[:, token] for a in answers_alone(model, prompts, clamps))
        rows.append(
            {
                "concept": word,
                "neuron": str(hit.neuron),
                "z": hit.z,
                "value": value,
                "dlogp": float(own.mean()),
                "share_raised": float((own >= NATS).float().mean()),
                "control_dlogp": sum(float(other.mean()) for other in others) / controls,
                "control_share_raised": sum(float((other >= NATS).float().mean()) for other in others) / controls,
            }
        )
    return pd.DataFrame(rows).sort_values("dlogp", ascending=False, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dose", type=float, default=5.0, help="multiple of max|hook_post|")
    arguments = parser.parse_args()
    frame = measure(arguments.dose)
    RESULTS.mkdir(exist_ok=True)
    frame.to_csv(RESULTS / "concept_clamps.csv", index=False, float_format="%.3f")
    print(frame.to_string(index=False, float_format="{:.2f}".format))
    raised = frame["share_raised"] >= 0.8
    quiet = (frame["control_dlogp"] < frame["dlogp"] / 2) & (frame["control_share_raised"] < 0.4)
    print(
        f"{len(frame)} concepts; {raised.sum()} raised by {NATS:g} nats in 80% of the prompts; "
        f"{(raised & quiet).sum()} of these with controls under half, in mean change and in share of prompts"
    )


if __name__ == "__main__":
    main()
