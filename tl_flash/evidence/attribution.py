"""What every neuron at every position gives a token's logit to first order: one forward and one backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_flash.clamps import attached, hook_point, neuron_site, require_hooks
from tl_flash.lens import Rule, linearised
from tl_flash.weights import MLPWeights, differentiating


@dataclass(frozen=True)
class Target:
    """What is explained: a token's logit minus the mean over the vocabulary, or minus another token's."""

    token: int
    against: int | None = None

    def score(self, logits: Float[Tensor, "... d_vocab"]) -> Tensor:
        """Its value."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide[..., self.token] - (wide.mean(-1) if self.against is None else wide[..., self.against])


@dataclass(frozen=True, eq=False)
class Attribution:
    """What one forward and one backward pass of a prompt show."""

    target: Target
    score: float
    """The target's value after the prompt."""
    prob: float
    """Of the token."""
    act: Float[Tensor, "layer position neuron"]
    """hook_post."""
    read: Float[Tensor, "layer position neuron"]
    """What W_in wrote, the pre-activation in an ungated MLP."""
    grad: Float[Tensor, "layer position neuron"]
    """Of the target by hook_post, by the rule."""
    stream: Float[Tensor, "layer+1 position d_model"]
    """The residual stream before each layer and after the last."""
    stream_grad: Float[Tensor, "layer+1 position d_model"]

    @property
    def flow(self) -> Float[Tensor, " layer+1"]:
        """The stream times its gradient, summed: under a rule that conserves, the score but for later biases."""
        return (self.stream.double() * self.stream_grad.double()).sum((1, 2))

    def strength(self, reference: Float[Tensor, "layer neuron"]) -> Float[Tensor, "layer position neuron"]:
        """Activation above the reference times gradient."""
        return (self.act - reference[:, None].to(self.act)) * self.grad

    def lengths(self, weights: MLPWeights) -> Float[Tensor, "layer position neuron"]:
        """How long what each neuron writes is, beside the residual stream after its layer."""
        streams = self.stream[1:].norm(dim=-1)
        return torch.stack([self._length(weights, layer) / streams[layer, :, None] for layer in range(len(self.act))])

    def _length(self, weights: MLPWeights, layer: int) -> Float[Tensor, "position neuron"]:
        act = self.act[layer]
        lengths = act.abs() * weights.directions(layer, "out").norm(dim=-1).to(act)
        if weights.layer(layer).gain_post is None:
            return lengths
        written = act @ weights.directions(layer, "out", fold_ln=False).to(act)
        return lengths / written.square().mean(-1, keepdim=True).sqrt()  # the norm after the MLP scales it so


def attribute(
    model: Any, row: Int[Tensor, " position"], token: int | None, against: int | None, rule: Rule
) -> Attribution:
    """Run a prompt forward and back; without a token, of the one that is predicted.

    Raises:
        TypeError: the model has no TransformerLens hooks.
        ValueError: a layer without a dense MLP, layers of several widths, or what the rule refuses.
    """
    require_dense(model)
    layers = range(len(model.blocks))
    stream: dict[int, Tensor] = {}
    acts: dict[int, Tensor] = {}
    reads: dict[int, Tensor] = {}

    def enter(residual: Tensor, hook: Any) -> Tensor:
        stream[0] = residual.detach().requires_grad_()
        return stream[0] * 1  # a block in place may not write to a leaf

    def see(tensor: Tensor, hook: Any, *, into: dict[int, Tensor], layer: int) -> Tensor:
        into[layer] = tensor
        return tensor

    hooks: list[Any] = [("blocks.0.hook_resid_pre", enter)]
    for layer in layers:
        places = {
            f"blocks.{layer}.hook_resid_post": (stream, layer + 1),
            neuron_site(model, layer, "post").name: (acts, layer),
            neuron_site(model, layer, "up").name: (reads, layer),
        }
        hooks += [(name, partial(see, into=into, layer=at)) for name, (into, at) in places.items()]
    with differentiating(model), linearised(model, row, rule), attached(model, hooks):
        logits = model(row[None].to(model.W_U.device))[0, -1]
        target = Target(int(logits.argmax()) if token is None else token, against)
        score = target.score(logits)
        inputs = [acts[layer] for layer in layers] + [stream[at] for at in range(len(layers) + 1)]
        grads = torch.autograd.grad(score, inputs)
    n = len(layers)

    def stack(tensors: Any) -> Tensor:
        return torch.stack([tensor.detach()[0].to(score.dtype).cpu() for tensor in tensors])

    return Attribution(
        target=target,
        score=float(score.detach()),
        prob=float(logits.detach().to(score.dtype).softmax(-1)[target.token]),
        act=stack(inputs[:n]),
        read=stack(reads[layer] for layer in layers),
        grad=stack(grads[:n]),
        stream=stack(inputs[n:]),
        stream_grad=stack(grads[n:]),
    )


def require_dense(model: Any) -> int:
    """The neurons of a layer, of a model whose layers all have as many, in dense MLPs that hooks reach.

    Raises:
        TypeError: the model has no TransformerLens hooks.
        ValueError: some layer has none, or another number.
    """
    require_hooks(model)
    widths = []
    for layer, block in enumerate(model.blocks):
        mlp = getattr(block, "mlp", None)
        W_in = getattr(mlp, "W_in", None)
        if not torch.is_tensor(W_in) or W_in.ndim != 2:
            raise ValueError(
                f"model: layer {layer} has no dense MLP, found {type(mlp).__name__} (a mixture of experts?), and no "
                "hook carries its neurons; explain a model whose layers all have dense MLPs"
            )
        hook_point(model, f"blocks.{layer}.mlp.hook_post")
        widths.append(W_in.shape[1])
    if len(set(widths)) != 1:
        raise ValueError(f"model: expected layers of one width, got {sorted(set(widths))} neurons")
    return widths[0]
