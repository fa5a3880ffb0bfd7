"""What a training run depends on, apart from the machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What a run depends on, apart from the machine."""

    seed: int = 0
    d_vocab: int = 2560
    d_model: int = 160
    d_mlp: int = 1024
    n_layers: int = 4
    n_heads: int = 5
    length: int = 128
    rows: int = 8
    steps: int = 10400
    learning_rate: float = 3e-3
    instruct_steps: int = 600
    instruct_learning_rate: float = 5e-4
    weight_decay: float = 0.5
    warmup: int = 100
    tokenizer_documents: int = 10_000
