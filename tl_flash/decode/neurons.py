"""Decode every neuron of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from inspect import signature
from typing import Any, Literal

import torch

from tl_flash.decode.job import Job
from tl_flash.decode.options import Options
from tl_flash.lens import JacobianLens, lens_of
from tl_flash.maps import NeuronMap
from tl_flash.progress import track


def flash_decode(
    model: Any,
    *,
    side: str = "in",
    score: str = "dot",
    k: int = 10,
    layers: Sequence[int] | None = None,
    fold_ln: bool = True,
    tokens: Sequence[str | int] | None = None,
    ignore_tokens: Sequence[str | int] | None = None,
    lens: JacobianLens | Literal["auto"] | None = None,
    precision: str = "exact",
    device: str | torch.device | None = None,
    max_bytes: int | None = None,
    progress: bool | None = None,
    tokenizer: Any = None,
) -> NeuronMap:
    """Decode every MLP neuron of a model into the tokens that its weights stand for.

    Each neuron's weight vector x is read through the unembedding (Davies 2025, arXiv 2501.02688, "Flash
    Interpretability"): the logits x @ W_U' minus their vocabulary mean, and the probabilities
    softmax(unembed(ln_final(x))) without bias or softcap. Both x and -x are decoded, since a gated neuron's
    activation takes both signs. A label of side "in" names the token whose direction drives the neuron; whether the
    neuron promotes that token is another matter, of which `write_z` gives a first idea and a clamp the proof.

    Args:
        model: a HookedTransformer or subclass, a TransformerBridge (with or without compatibility mode), a Hugging
            Face causal LM, or a checkpoint, quantised or not, by its folder, its .gguf file or its name on the hub,
            which is read a piece of a layer at a time without building the model.
        side: which vector of a neuron: "in" (W_in, the up-projection in a gated MLP), "gate" (W_gate) or "out" (W_out).
        score: "dot" (the paper's), or "cosine" of direction and unembedding column, for which `logits` are cosines, z
            is the cosine over its standard deviation, and there are no probabilities. A model loaded with
            center_unembed, as `from_pretrained` does, has other cosines than one loaded without; `source` says which.
        k: tokens to keep at each pole.
        layers: which layers; all by default.
        fold_ln: fold the norms' scales in as `HookedTransformer.from_pretrained` does. The result then does not
            depend on how the model was loaded. False reads the weights as the model holds them: on an unprocessed
            model the paper's literal ``lm_head @ up_proj``.
        tokens: tokens whose logits to keep for every neuron, in `NeuronMap.tracked`.
        ignore_tokens: tokens never to report (special or untrained ones). Statistics still run over the whole
            vocabulary. Ids past the tokenizer's vocabulary are never reported.
        lens: carries what neurons write through the mean Jacobian of the rest of the model (`jacobian_lens`): side
            "out" then decodes J @ W_out, the neuron's effect on the output to first order, and `write_z` of every
            side is through the lens. "auto" makes the mean-field lens of the package's own texts on the way, for which
            the model has to run: a HookedTransformer or a TransformerBridge. `source.lens_made` says what was made.
        precision: "exact" proves every neuron's top tokens; "fast" leaves out the proof.
        device: where to compute; by default where W_U is.
        max_bytes: scratch memory.
        progress: a bar; by default on a terminal or in a notebook.
        tokenizer: names the tokens of a model that holds no tokenizer, such as a Hugging Face one.

    Returns:
        NeuronMap: tensors [layer, neuron, ...] on the CPU.

    Raises:
        TypeError: `model` is none of the above.
        FileNotFoundError: no such checkpoint, or a file of it is missing.
        ValueError: an unknown side, score, precision, layer or token, no layers, a k below 1 or above what can be
            reported, a layer whose neurons cannot be read, layers of several widths, NaN or infinite weights, a
            broken checkpoint, or a lens of another model, without a layer asked for, or with `fold_ln=False`.

    Example:
        >>> neurons = flash_decode(model, k=3)
        >>> neurons.positive.ids.shape == (model.cfg.n_layers, neurons.d_mlp, 3)
        True
        >>> neurons["L0N5"].positive[0].token == neurons.positive.strings[0, 5, 0]
        True
    """
    options = Options(
        side=side,
        score=score,
        k=k,
        layers=layers,
        fold_ln=fold_ln,
        tokens=tokens,
        ignore_tokens=ignore_tokens,
        lens=lens,
        precision=precision,
        device=device,
        max_bytes=max_bytes,
    )
    if lens is not None:
        options = replace(options, lens=lens_of(model, lens, layers=layers, progress=progress))
    job = Job.of(model, options, tokenizer=tokenizer)
    return job.assemble(track(job.run(job.units), f'decoding "{side}"', progress, total=len(job.units)))


def options_of(given: dict[str, Any]) -> Options:
    """What `flash_decode` would be asked for by these of its keyword arguments; those not given are its defaults.

    Raises:
        TypeError: one that it does not have.
    """
    defaults = {name: kind.default for name, kind in signature(flash_decode).parameters.items()}
    names = [field.name for field in fields(Options)]
    unknown = given.keys() - set(names)
    if unknown:
        raise TypeError(f"options: expected {', '.join(names)}, got {', '.join(sorted(unknown))}")
    return Options(**{name: given.get(name, defaults[name]) for name in names})
