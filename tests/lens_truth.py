"""Models in float64, and the mean effect of a change of the residual stream by central differences."""

from functools import cache

import torch

from tests import families
from tl_flash.clamps import attached


@cache
def in_double(name):
    """A model that computes in float64 throughout: Hugging Face's RMS norms do not, HookedTransformer's can."""
    if not families.HAS_HOOKED_TRANSFORMER:
        return families._bridge(name, compatible=False).double()
    model = families._hooked(name, processed=False)
    model.cfg.dtype = torch.float64
    return model.double()


def difference(model, tokens, layer, delta, centre, frozen=()):
    """Central difference of the normalised final residual stream, in the mean over its positions from 8 on, float64.

    The change is made at every position but the first; `frozen` are layers whose attention patterns are kept.
    """
    last = len(model.blocks) - 1
    kept = {}
    record = [
        (f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook, layer=layer: kept.__setitem__(layer, pattern))
        for layer in frozen
    ]
    with torch.no_grad(), attached(model, record):
        model(tokens)

    def run(step):
        seen = {}

        def add(residual, hook):
            moved = residual.clone()
            moved[:, 1:] += step * delta
            return moved

        hooks = [(f"blocks.{layer}.hook_resid_post", add)]
        hooks += [(f"blocks.{last}.hook_resid_post", lambda residual, hook: seen.__setitem__("final", residual))]
        hooks += [
            (f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook, layer=layer: kept[layer]) for layer in frozen
        ]
        with torch.no_grad(), attached(model, hooks):
            model(tokens)
        final = seen["final"][0, min(8, tokens.shape[1] - 1) :]
        if centre:
            final = final - final.mean(-1, keepdim=True)
        return (final / (final.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt()).mean(0)

    step = 1e-5
    return (run(step) - run(-step)) / (2 * step)
