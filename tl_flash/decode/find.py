"""Which neurons are about a concept: every neuron scored on the tokens of a word, straight from the weights."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from tl_flash import kernel
from tl_flash.decode.scan import scan
from tl_flash.decode.wording import TokenSet, given_tokens, phrases_of, spells_same, tokens_of
from tl_flash.devices import device_of
from tl_flash.kernel import Unembedding
from tl_flash.lens import JacobianLens, lens_of
from tl_flash.maps import ConceptHits, ConceptTable, require_count
from tl_flash.vocab import Vocab
from tl_flash.weights import chosen_layers, read, require_side

Tokens = Mapping[str | int, float] | Sequence[str | int]
"""A set of tokens given by hand."""


def find_neurons(
    model: Any,
    concept: str | Sequence[str],
    *,
    side: str | None = None,
    sides: Sequence[str] | None = None,
    lens: JacobianLens | Literal["auto"] | None = None,
    tokens: Tokens | None = None,
    related: int = 0,
    n: int = 20,
    by: str = "z",
    layers: Sequence[int] | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    tokenizer: Any = None,
) -> ConceptHits:
    """Of all neurons of a model, those about a concept, best first; no map is needed.

    A neuron's score is the weighted mean, over the tokens of the concept, of the z-score that each has in the neuron's
    direction: that of `flash_decode` (Davies 2025, arXiv 2501.02688), but of all neurons, not only of those that have
    a token among their top ones. It comes with p-values against shuffled neurons and against random tokens
    (`ConceptNull`), and a q-value of the larger over all neurons and sides. Like a label it says what a direction
    points to; a clamp shows what the neuron does.

    Args:
        model: as in `flash_decode`: a model, or a checkpoint, which is read a piece of a layer at a time.
        concept: a word ("dog"), a short phrase, or several. Its tokens are found in the vocabulary: with and without a
            leading space, in all cases, plural and simple inflections, the first piece where a word is several tokens.
        side: "in", "gate", "out", or "lens": "out" through the lens.
        sides: several of them; by default all that the model has, and "lens" where one is given.
        lens: adds the reading "lens", and says what neurons write in place of "out"; "auto" as in `flash_decode`.
        tokens: the set by hand in place of the concept's own: strings or ids, or a mapping to weights, as
            `ConceptHits.tokens` is; the concept then is but a name.
        related: how many tokens to add that are nearest to the concept's by the cosine of their columns of W_U', each
            by the weight of that cosine; none that spells alike.
        n: how many hits at most.
        by: "z" (the greatest |mean z|), "p" (the least p-value), or "coherence": neurons that read the concept and
            write it, by the smaller of the two |z|, with the larger of their p-values.
        layers: which layers; all by default.
        device: where to compute; by default where W_U is.
        progress: a bar; by default on a terminal or in a notebook.
        tokenizer: names the tokens of a model that holds no tokenizer.

    Returns:
        ConceptHits: a sequence of ConceptHit (neuron, side, sign, z, write_z, p_value, p_tokens, q_value, breadth,
        token), with the tokens looked for; `hits.clamps(dose, stats)` is what to clamp.

    Raises:
        TypeError: no model, or a concept or token of another kind.
        FileNotFoundError: no such checkpoint.
        ValueError: an empty concept, a word of no token at all, tokens that do not exist, n below 1, a negative
            `related`, an unknown side, order or layer, both `side` and `sides`, both `tokens` and
            `related`, side "lens" without a lens, or a lens
            of another model.

    Example:
        >>> hits = find_neurons(model, "dog", side="out", n=3)
        >>> len(hits), hits[0].side, abs(hits[0].z) >= abs(hits[1].z)
        (3, 'out', True)
    """
    require_count("n", n)
    if related and tokens is not None:
        raise ValueError(
            f"related: expected it or tokens, which are the whole set; got both, {related!r} and {tokens!r}"
        )
    if side is not None and sides is not None:
        raise ValueError(f"side: expected it or sides, got both, {side!r} and {sides!r}")
    name = ", ".join(phrases_of(concept))
    table = _search(
        model,
        {name: (concept, tokens)},
        sides=sides if side is None else (side,),
        lens=lens,
        related=related,
        layers=layers,
        device=device,
        progress=progress,
        tokenizer=tokenizer,
    )
    return table.hits(name, n, by=by)


def concepts(
    model: Any,
    words: Sequence[str] | Mapping[str, str | Sequence[str] | Mapping[str | int, float]],
    *,
    sides: Sequence[str] | None = None,
    lens: JacobianLens | Literal["auto"] | None = None,
    related: int = 0,
    layers: Sequence[int] | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    tokenizer: Any = None,
) -> ConceptTable:
    """All neurons of a model by any number of concepts, in one pass over the weights: where it keeps animals, places.

    Args:
        model: as in `find_neurons`, and so are sides, lens, related, layers, device, progress and tokenizer.
        words: the concepts, each a word or a short phrase; or a mapping of names to a word, to several, or to a set of
            tokens by hand with their weights.
        sides: which readings.
        lens: adds the reading "lens".
        related: tokens to add to each concept, but for sets by hand.
        layers: which layers.
        device: where to compute.
        progress: a bar.
        tokenizer: names the tokens.

    Returns:
        ConceptTable: mean z [concept, reading, neuron]; `table["dog"]` are the neurons about one,
        `plots.concepts(table)` shows the layers.

    Raises:
        TypeError: as in `find_neurons`, or one text in place of a list.
        ValueError: as in `find_neurons`, no concepts, or one twice.

    Example:
        >>> table = concepts(model, ["dog", "cat"], sides=["in", "out"])
        >>> table.z.shape == (2, 2, model.cfg.n_layers * model.cfg.d_mlp)
        True
    """
    if isinstance(words, str):
        raise TypeError(f"words: expected a list of concepts, got one text; write [{words!r}]")
    if not isinstance(words, Mapping | Sequence) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"words: expected a list of texts, or a mapping by their names, got {reprlib.repr(words)}")
    if not words:
        raise ValueError("words: expected at least one concept, got none")
    if not isinstance(words, Mapping):
        twice = [word for at, word in enumerate(words) if word in words[:at]]
        if twice:
            raise ValueError(f"words: expected each concept once, got {twice[0]!r} again")
        words = {word: word for word in words}
    return _search(
        model,
        {name: ((name, of) if isinstance(of, Mapping) else (of, None)) for name, of in words.items()},
        sides=sides,
        lens=lens,
        related=related,
        layers=layers,
        device=device,
        progress=progress,
        tokenizer=tokenizer,
    )


def _search(
    model: Any,
    asked: Mapping[str, tuple[str | Sequence[str], Tokens | None]],
    *,
    sides: Sequence[str] | None,
    lens: JacobianLens | Literal["auto"] | None,
    related: int,
    layers: Sequence[int] | None,
    device: str | torch.device | None,
    progress: bool | None,
    tokenizer: Any,
) -> ConceptTable:
    """Concepts by name, each its words and, where they are given by hand, its tokens."""
    if isinstance(related, bool) or not isinstance(related, int) or related < 0:
        raise ValueError(f"related: expected a whole number of tokens, 0 or more, got {related!r}")
    for name in asked:
        phrases_of(name)
    device_of(device)
    weights = read(model, tokenizer=tokenizer)
    chosen, numbers = _sides(sides, weights.sides, lens), chosen_layers(layers, weights.n_layers)
    if lens is not None:
        lens = lens_of(model, lens, layers=numbers, progress=progress)
        lens.require_model(weights)
    vocab = weights.vocab
    unembedding = kernel.prepare(weights.W_U, gain=weights.final_gain, centre=weights.centre, device=device)
    sets = {
        name: given_tokens(vocab, tokens)
        if tokens is not None
        else with_related(tokens_of(vocab, words), related, vocab, unembedding)
        for name, (words, tokens) in asked.items()
    }
    return scan(
        weights,
        unembedding,
        sets,
        sides=chosen,
        layers=numbers,
        lens=lens,
        progress=progress,
    )


def with_related(tokens: TokenSet, count: int, vocab: Vocab, unembedding: Unembedding) -> TokenSet:
    """A set and the tokens nearest to it: by cosine, of columns of W_U' less their mean, with the set's mean column."""
    if count == 0:
        return tokens
    columns = kernel.centred_columns(unembedding, torch.tensor(list(tokens), device=unembedding.device))
    weights = torch.tensor(list(tokens.values()), device=columns.device)
    centre = torch.nn.functional.normalize(columns, dim=0) @ weights
    (cosines,) = kernel.column_cosines(unembedding, centre[:, None]).cpu()
    cosines[vocab.nameless()] = -1
    found = dict(tokens)
    for id in cosines.argsort(descending=True, stable=True).tolist():
        if len(found) == len(tokens) + count or cosines[id] <= 0:
            break
        if not any(spells_same(vocab, id, own) for own in found):
            found[id] = round(float(cosines[id]), 3)
    return found


def _sides(sides: Sequence[str] | None, there: Sequence[str], lens: object) -> tuple[str, ...]:
    if sides is None:
        return (*there, "lens") if lens is not None else tuple(there)
    if isinstance(sides, str):
        raise TypeError(f"sides: expected a list, got one text; write side={sides!r}")
    if not isinstance(sides, Sequence) or not all(isinstance(side, str) for side in sides):
        raise TypeError(f"sides: expected a list of texts, got {sides!r}")
    if not sides or len(set(sides)) < len(sides):
        raise ValueError(f"sides: expected at least one side, each once, got {list(sides)}")
    for side in sides:
        if side == "lens" and lens is None:
            raise ValueError('side: "lens" is what neurons write, carried through a lens; give lens=')
        if side != "lens":
            require_side(side, there)
    return tuple(sides)
