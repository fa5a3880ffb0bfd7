"""The one way to make a lens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from tl_flash.clamps import Prompts, require_hooks
from tl_flash.lens.exact import exact
from tl_flash.lens.lens import JacobianLens
from tl_flash.lens.mean_field import mean_field
from tl_flash.lens.mixed import mixed
from tl_flash.lens.texts import own_texts
from tl_flash.weights import chosen_layers, read

Method = Literal["mean_field", "exact", "mixed"]
EXACT_PROMPTS = 8
"""Of how many prompts the mixed lens takes the exact mean."""


def jacobian_lens(
    model: Any,
    prompts: Sequence[str] | Tensor | Sequence[Tensor] | None = None,
    *,
    chat: bool = False,
    method: Method = "mean_field",
    layers: Sequence[int] | None = None,
    freeze_attention: bool = True,
    max_error: float | None = None,
    exact_prompts: int | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> JacobianLens:
    """What a change of the residual stream after each layer does to the model's output, to first order and on average.

    The logit lens reads the residual stream as if no layer followed. The lens of layer l is the mean Jacobian J_l of
    the normalised final residual stream, at positions from 8 on (of a shorter text, at its last one), by one change at
    every position of `hook_resid_post` but the first. The first is left alone: it often is an attention sink, and where
    the embedding there is zero its derivative is without bound. Related are the tuned lens (Belrose et al. 2023, arXiv
    2303.08112), which trains an affine map a layer, and the Jacobian lens of Gurnee et al. 2026 (arXiv 2607.15495),
    which TransformerLens has as `tools.analysis.JacobianLens`: see `JacobianLens.of`.

    "exact" differentiates through the whole model, d_model backward passes a batch, and averages over texts. Its error
    is that of few texts; `stderr` tells it.

    "mean_field" replaces, text by text, the mean of a product by the product of means:

        J_l = F . prod over m > l of (1 + B_m) (1 + A_m)        (1 + A_m + B_m where attention and MLP are parallel)

    with A_m, B_m and F the mean Jacobians of what attention and the MLP of layer m add, and of the final norm, over the
    tokens of a text; the lens is the mean over texts. Tokens of one text that differ are not averaged together: they
    are in two classes, whose residual streams point apart half-way through the model, so B is a mean by class and A one
    by pairs of classes, of where a change is made and where it arrives. (The product is then of matrices of classes,
    and the lens the sum over the classes that the output is at and the change is made at.) Each factor has a closed
    form, so a forward pass a text is all that it takes. With n the residual stream over its root mean square, r one
    over that, gains folded into the matrices, P the attention pattern, a gated MLP f(g) u:

        B = W_out' [diag E(f r) U + diag E(f' u r) G - E((f u + f' u g) r n') / d]
        A = sum over heads of W_O' W_V' E(sum over s >= 1 of P_ts r_s (1 - n_s n_s' / d))
        F = E(r (1 - n n' / d))

    Norms after attention or MLP, LayerNorm, ungated MLPs and any elementwise activation have their like. A block that
    these forms do not reproduce on a text (a mixture of experts, linear attention, a scaled residual stream) is known
    by that, and its own mean Jacobian is measured by d_model backward passes through it alone. Neglected are: how the
    factors of different layers, and of attention and MLP, vary together over the tokens of a class; how a change moves
    the attention patterns; that A and B are means over positions from 1 and F from 8; and that some positions hand more
    of a change on than others. `check_lens` tells what is lost by it.

    "mixed" adds the two, layer by layer, with the weights that bring the sum nearest to the exact mean over many texts;
    how the few texts of its exact mean differ from the rest is first taken off by what their mean-field lenses show.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        prompts: strings, or token ids [prompt, position]; text like the text that effects are wanted for. By default 64
            short texts of many kinds that the package carries, for "mean_field" the first 32 tokens of every fourth.
        chat: each of your prompts is what a user says, in the tokenizer's chat template.
        method: "mean_field" (forward passes), "exact" (d_model backward passes a batch) or "mixed".
        layers: which layers; all by default.
        freeze_attention: whether "exact" and "mixed" hold the attention patterns constant as well; with few texts this
            takes away more noise than truth, and time.
        max_error: "exact" stops when the standard error, relative to J, is at most this in every layer.
        exact_prompts: of how many of the prompts "mixed" takes the exact mean; by default 8.
        batch_size: prompts a forward pass of "exact" and "mixed"; the mean-field lens runs as many together
            as have 512 tokens and Jacobians of 1 GiB.
        progress: a bar; by default on a terminal or in a notebook.

    Returns:
        JacobianLens: float32, on the CPU.

    Raises:
        TypeError: no such model, or prompts of another kind.
        ValueError: no prompts, too long ones or some of one token, unknown layers or method, an option of another
            method, chat without prompts, or a model whose weights cannot be read.

    Example:
        >>> lens = jacobian_lens(model)
        >>> lens.J.shape == (model.cfg.n_layers, model.cfg.d_model, model.cfg.d_model)
        True
    """
    require_hooks(model)
    weights = read(model)
    chosen = chosen_layers(layers, weights.n_layers)
    if method not in get_args(Method):
        raise ValueError(f'method: expected "mean_field", "exact" or "mixed", got {method!r}')
    if method == "mean_field" and not freeze_attention:
        raise ValueError('freeze_attention: it is for method="exact" or "mixed"; the mean-field lens always does')
    if max_error is not None and method != "exact":
        raise ValueError(f'max_error: it is for method="exact", got method={method!r}')
    if max_error is not None and not max_error > 0:
        raise ValueError(f"max_error: expected a number above 0, got {max_error}")
    if exact_prompts is not None and method != "mixed":
        raise ValueError(f'exact_prompts: it is for method="mixed", got method={method!r}; leave it out')
    if chat and prompts is None:
        raise ValueError("chat: it is for prompts of your own, and the package's are no questions; give prompts")
    texts = own_texts(model, few=method == "mean_field") if prompts is None else Prompts.of(model, prompts, chat=chat)
    if min(map(len, texts.rows)) < 2:
        raise ValueError("prompts: expected at least two tokens each, since the first is left alone; got one of one")
    start = time.perf_counter()
    if method == "mean_field":
        made = mean_field(model, texts, chosen, progress=progress)
    else:
        options: dict[str, Any] = {
            "freeze_attention": freeze_attention,
            "batch_size": batch_size,
            "progress": progress,
        }
        if method == "exact":
            made = exact(model, texts, chosen, max_error=max_error, **options)
        else:
            count = EXACT_PROMPTS if exact_prompts is None else exact_prompts
            made = mixed(model, weights, texts, chosen, exact_prompts=count, **options)
    return JacobianLens.with_papers(made, weights, chosen, method, seconds=time.perf_counter() - start)


def lens_of(
    model: Any,
    lens: JacobianLens | Literal["auto"],
    *,
    layers: Sequence[int] | None = None,
    progress: bool | None = None,
) -> JacobianLens:
    """The lens given; for "auto" the mean-field lens of the package's own texts.

    Raises:
        TypeError: "auto", and the model cannot be run; or neither a lens nor a word.
        ValueError: another word.
    """
    if isinstance(lens, JacobianLens):
        return lens
    if not isinstance(lens, str):
        raise TypeError(f'lens: expected a JacobianLens or "auto", got {type(lens).__name__}')
    if lens != "auto":
        raise ValueError(f'lens: expected a JacobianLens or "auto", got {lens!r}; JacobianLens.load reads a file')
    return jacobian_lens(model, layers=layers, progress=progress)
