"""What a block is made of, read off what passed through it, and whether its closed forms hold for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_flash.lens.factors import Entry, Exit, attention_jacobian, each_of, mlp_jacobian
from tl_flash.lens.norms import Norm
from tl_flash.lens.passages import NORMS, Call, Passage


@dataclass(frozen=True)
class Block:
    """Attention and an MLP, each with a norm before it, after it, both or neither, of which two Jacobians are known.

    Which norm is which is told by the tensors that went into each and came out of it, not by its name.
    """

    module: Any
    """The model's own block."""
    attention: tuple[Norm | None, Norm | None]
    """The norms before and after attention."""
    mlp: tuple[Norm | None, Norm | None]
    parallel: bool
    """Whether the MLP reads what entered the block, as attention does, and not what attention left."""

    @classmethod
    def of(cls, module: Any, passage: Passage) -> Block | None:
        """The block through which a passage went; None where its closed forms do not hold for it.

        They hold where, at every token, what attention and MLP wrote is made of the pattern, the weights and the
        activations in the way that the forms suppose, and both added to what entered are what left.
        """
        calls = passage.calls
        if not _is_whole(module, passage):
            return None
        norms = {name: calls[name] for name in NORMS if name in calls}
        before = {part: _feeding(calls[part], norms) for part in ("attn", "mlp")}
        after = {part: _fed(calls[part], norms) for part in ("attn", "mlp")}
        if before["attn"] is None and not _among(passage.entered, calls["attn"].given):
            return None
        source = norms[before["mlp"]].given if before["mlp"] else calls["mlp"].given
        parallel = _among(passage.entered, source)

        def probed(name: str | None) -> Norm | None:
            return None if name is None else Norm.probe(getattr(module, name), passage.entered)

        attention, mlp = ((probed(before[part]), probed(after[part])) for part in ("attn", "mlp"))
        block = cls(module, attention, mlp, parallel)
        return block if block._holds(passage) else None

    def jacobians(
        self, passage: Passage, members: Float[Tensor, "text class position"]
    ) -> tuple[Float[Tensor, "text to from d_model d_model"], Float[Tensor, "text class d_model d_model"]]:
        """Of what attention and the MLP add, in the mean over the positions of each class of each text.

        Attention's is by one change of every position of another class, or of the same; the MLP's by a change of its
        own position. Members are 1, others 0, first positions among them. Of a class without members they are 0.
        """
        n_classes = members.shape[1]
        of_class = members[..., 1:]
        share = of_class / of_class.sum(-1, keepdim=True).clamp(min=1)
        attention = self._attention(passage, of_class, share)
        before, after = self.mlp
        mid = self._mid(passage)[:, 1:]
        entry = _entry(before, mid).each(n_classes)
        exit = _exit(after, _wide(passage.calls["mlp"].answer)[:, 1:]).each(n_classes)
        inputs, W_out, gain = self._mlp_weights()
        pre = [_wide(each)[:, 1:] for each in passage.pre]
        one = _normal(before, mid[0, :1]) * gain
        reads = [each_of(each - _bias(each[0, :1], one, W), n_classes) for each, W in zip(pre, inputs, strict=True)]
        slopes = [each_of(slope[:, 1:], n_classes) for slope in _slopes(passage)]
        exit = exit._replace(l=exit.l * share.flatten(0, 1))
        mlp = _folded(mlp_jacobian(entry, exit, slopes, reads, inputs, W_out, gain), *self.mlp)
        return attention, mlp.unflatten(0, (-1, n_classes))

    def _attention(
        self, passage: Passage, of_class: Float[Tensor, "text class position"], share: Tensor
    ) -> Float[Tensor, "text to from d_model d_model"]:
        """By pairs of classes, each as if it were a text whose other targets and sources do not count."""
        (before, after), n_classes = self.attention, of_class.shape[1]
        x, pattern = _wide(passage.entered)[:, 1:], passage.pattern
        assert pattern is not None
        pattern = pattern[:, :, 1:, 1:].to(x)
        entry = _entry(before, x).each(n_classes**2)
        exit = _exit(after, _wide(passage.calls["attn"].answer)[:, 1:]).each(n_classes**2)
        targets = share[:, :, None].expand(-1, -1, n_classes, -1).flatten(0, 2)
        sources = of_class[:, None].expand(-1, n_classes, -1, -1).flatten(0, 2)
        entry, exit = entry._replace(r=entry.r * sources), exit._replace(l=exit.l * targets)
        W_O = _wide(self.module.attn.W_O)
        found = attention_jacobian(entry, exit, each_of(pattern, n_classes**2), self._values(), W_O)
        return _folded(found, *self.attention).unflatten(0, (-1, n_classes, n_classes))

    def _values(self) -> Float[Tensor, "head d_model d_head"]:
        before, W_V = self.attention[0], _wide(self.module.attn.W_V)
        W_V = W_V if before is None else W_V * before.gain[:, None]
        return W_V.repeat_interleave(len(self.module.attn.W_O) // len(W_V), dim=0)

    def _mlp_weights(
        self,
    ) -> tuple[list[Float[Tensor, "d_model d_mlp"]], Float[Tensor, "d_mlp d_model"], Float[Tensor, " d_model"]]:
        """Of each pre-activation, W_out, and the gain of the norm before."""
        mlp, before = self.module.mlp, self.mlp[0]
        gated = torch.is_tensor(getattr(mlp, "W_gate", None))
        W_out = _wide(mlp.W_out)
        inputs = [_wide(W) for W in ((mlp.W_gate, mlp.W_in) if gated else (mlp.W_in,))]
        return inputs, W_out, W_out.new_ones(W_out.shape[1]) if before is None else before.gain

    def _mid(self, passage: Passage) -> Float[Tensor, "text position d_model"]:
        """What the MLP, or the norm before it, reads."""
        x = _wide(passage.entered)
        return x if self.parallel else x + _through(self.attention[1], _wide(passage.calls["attn"].answer))

    def _holds(self, passage: Passage) -> bool:
        """Whether the forms give what the passage shows, up to what is constant over tokens: biases."""
        tolerance = 1e-3 if passage.entered.dtype in (torch.float32, torch.float64) else 3e-2
        x, mid, pattern = _wide(passage.entered), self._mid(passage), passage.pattern
        attention, mlp = (_wide(passage.calls[part].answer) for part in ("attn", "mlp"))
        assert pattern is not None and passage.post is not None and passage.left is not None
        values = torch.einsum("bsd,hdk->bhsk", _normal(self.attention[0], x), self._values())
        mixed = torch.einsum("bhtk,hke->bte", pattern.to(x) @ values, _wide(self.module.attn.W_O))
        inputs, W_out, gain = self._mlp_weights()
        read = _normal(self.mlp[0], mid) * gain
        pairs = [(attention, mixed), (mlp, _wide(passage.post) @ W_out)]
        pairs += [(_wide(pre), read @ W) for pre, W in zip(passage.pre, inputs, strict=True)]
        written = _through(self.attention[1], attention) + _through(self.mlp[1], mlp)
        exact = (_wide(passage.left) - x - written).norm() <= tolerance * written.norm()
        return bool(exact) and all(_same_but_for_biases(*pair, tolerance) for pair in pairs) and _elementwise(passage)


def _is_whole(module: Any, passage: Passage) -> bool:
    """Whether all is there that the forms need."""
    matrices: list[Any] = [getattr(getattr(module, part, None), name, None) for part, name in _MATRICES]
    shown = passage.pattern is not None and passage.post is not None and {"attn", "mlp"} <= passage.calls.keys()
    if not shown or not all(torch.is_tensor(matrix) and matrix.is_floating_point() for matrix in matrices):
        return False
    W_V, W_O = matrices[:2]
    gated = torch.is_tensor(getattr(module.mlp, "W_gate", None))
    heads = passage.pattern.shape[1] if passage.pattern is not None and passage.pattern.ndim == 4 else 0
    return (
        W_V.ndim == 3 and W_O.ndim == 3 and heads == len(W_O) and heads % len(W_V) == 0
        and matrices[2].ndim == 2 and len(passage.pre) == 1 + gated
    )  # fmt: skip


_MATRICES = (("attn", "W_V"), ("attn", "W_O"), ("mlp", "W_in"), ("mlp", "W_out"))


def _among(tensor: Tensor, others: tuple[Tensor, ...]) -> bool:
    return any(tensor.shape == other.shape and torch.equal(tensor, other) for other in others)


def _feeding(part: Call, norms: dict[str, Call]) -> str | None:
    """The norm whose answer a part was given."""
    return next((name for name, norm in norms.items() if _among(norm.answer, part.given)), None)


def _fed(part: Call, norms: dict[str, Call]) -> str | None:
    """The norm that was given a part's answer."""
    return next((name for name, norm in norms.items() if _among(part.answer, norm.given)), None)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, without a gradient."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _normal(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm.unit(x)[0]


def _through(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _entry(norm: Norm | None, x: Tensor) -> Entry:
    return Entry(None, torch.ones_like(x[..., 0])) if norm is None else Entry(*norm.unit(x))


def _exit(norm: Norm | None, x: Tensor) -> Exit:
    return Exit(None, torch.ones_like(x[..., 0])) if norm is None else Exit(*norm.unit(x))


def _folded(matrix: Tensor, before: Norm | None, after: Norm | None) -> Tensor:
    """With the gain of the norm after, and the centring of both."""
    if after is not None:
        matrix = after.after(matrix)
    return matrix - matrix.mean(-1, keepdim=True) if before is not None and before.centre else matrix


def _bias(pre: Tensor, read: Tensor, W: Tensor) -> Tensor:
    """What is in the pre-activations of one token, and so of all, beside what they read there."""
    return pre - read @ W


def _same_but_for_biases(shown: Tensor, made: Tensor, tolerance: float) -> bool:
    error = (shown - made).flatten(0, -2)
    return bool((error - error.mean(0)).norm() <= tolerance * shown.norm())


def _slopes(passage: Passage) -> list[Tensor]:
    """The derivative of each of hook_post by the pre-activations of its own neuron."""
    assert passage.post is not None
    return [_wide(slope) for slope in torch.autograd.grad(passage.post.sum(), passage.pre)]


def _elementwise(passage: Passage) -> bool:
    """Whether hook_post of a neuron depends on no other neuron's pre-activations."""
    post = passage.post
    if post is None or not post.requires_grad:
        return False
    signs = torch.randn(post.shape, generator=torch.Generator().manual_seed(0)).sign().to(post)
    plain, signed = (
        torch.autograd.grad((post * weight).sum(), passage.pre, retain_graph=True, allow_unused=True)
        for weight in (torch.ones_like(signs), signs)
    )
    pairs = list(zip(plain, signed, strict=True))
    return all(a is not None and b is not None and torch.allclose(a * signs, b, rtol=1e-3, atol=1e-5) for a, b in pairs)
