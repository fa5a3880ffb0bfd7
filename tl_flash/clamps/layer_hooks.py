"""The hooks that clamp: one a layer, of several neurons in every row or of one neuron in each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_flash.clamps.positions import Positioned
from tl_flash.clamps.sites import Site, refuse_block_hook
from tl_flash.clamps.values import APPLY, Mode, fits, require_finite
from tl_flash.names import AnyNeuron, Neuron


class SiteHook:
    """The hook of one layer, or expert: clamps activations [batch, position, d_mlp], an expert's [token, d_mlp]."""

    def __init__(self, site: Site, neurons: Sequence[AnyNeuron], sequence: Positioned | None):
        self.site = site
        self._neurons = list(neurons)
        self._sequence = sequence
        self._fired = False
        self._last_pass = 0
        self._reached: set[int] = set()
        if site.d_mlp is not None:
            self._require_width(site.d_mlp)

    def __call__(self, act: Tensor, hook: Any) -> Tensor:
        """Act in a pass, as TransformerLens calls its hooks."""
        refuse_block_hook(hook.name)
        self._require_width(act.shape[-1])
        if not len(act):
            return act  # an expert to which no token was routed
        self._fired = True
        columns = self._columns(act.shape[-2])
        if columns is not None and not columns:
            return act
        return self._clamped(act, columns)

    def _clamped(self, act: Tensor, columns: list[int] | None) -> Tensor:
        raise NotImplementedError

    def idle(self) -> str | None:
        """What this clamp was asked to do and never did, or None."""
        if not self._fired:
            covered = "where an SAE has taken its place, model.reset_saes() gives it back"
            if self.site.expert is not None:
                return f"no token was routed to expert {self.site.expert}, {self.site.name}"
            return f"no forward pass went through {self.site.name} ({covered})"
        missed = None if self._sequence is None else self._sequence.missed(self._reached)
        return None if missed is None else f"at {self.site.name}, no pass reached {missed}"

    def _columns(self, width: int) -> list[int] | None:
        """The columns to clamp in this pass, or None for all."""
        sequence = self._sequence
        if sequence is None:
            return None
        if sequence.passes == self._last_pass or sequence.width != width:
            raise RuntimeError(
                f"positions: {self.site.name} saw {width} columns, but the attention hook that tells their positions, "
                f"{sequence.name}, did not see this pass; clamp every position, or a model that has that hook"
            )
        self._last_pass = sequence.passes
        columns = sequence.columns()
        self._reached.update(sequence.start + column for column in columns)
        return columns

    def _require_width(self, d_mlp: int) -> None:
        for neuron in self._neurons:
            if neuron.index >= d_mlp:
                raise ValueError(f"neuron {neuron}: expected an index below {d_mlp}, the neurons of {self.site.name}")


class LayerClamp(SiteHook):
    """Several neurons, in every row."""

    def __init__(
        self, site: Site, values: dict[AnyNeuron, float | Tensor], mode: str, sequence: Positioned | None
    ) -> None:
        super().__init__(site, list(values), sequence)
        self._values = list(values.values())
        self._mode = mode

    def __repr__(self) -> str:
        return f"clamp({self._mode}, {len(self._neurons)} neurons)"

    def _clamped(self, act: Tensor, columns: list[int] | None) -> Tensor:
        neurons = torch.tensor([neuron.index for neuron in self._neurons], device=act.device)
        values = self._stack_values(act)  # [neuron] or [batch, position, neuron]
        where: tuple[Any, ...] = (..., neurons)
        if columns is not None:
            rows = torch.tensor(columns, device=act.device)
            where = (..., rows[:, None], neurons)
            if values.ndim > 1 and values.shape[-2] > 1:
                values = values[..., rows, :]
        clamped = act.clone()  # in place, the backward pass of ReLU would break
        clamped[where] = APPLY[self._mode](act[where], values)
        return clamped

    def _stack_values(self, act: Tensor) -> Tensor:
        """The values, [neuron] or broadcastable to [batch, position, neuron]; read anew, as they may be trained."""
        if any(isinstance(value, Tensor) for value in self._values):
            each = (torch.as_tensor(value).to(act) for value in self._values)
            values = torch.stack(torch.broadcast_tensors(*each), dim=-1)
        else:
            values = torch.tensor(self._values, dtype=torch.float64).to(act)
        require_finite(values, act)
        if not fits(values.shape[:-1], act.shape[:-1]):
            raise ValueError(
                f"neurons: expected values that broadcast to [batch, position] = {list(act.shape[:-1])} of this pass, "
                f"got {list(values.shape[:-1])}; a scalar fits every pass"
            )
        return values


class RowClamp(SiteHook):
    """One neuron in each of some rows."""

    def __init__(
        self,
        site: Site,
        rows: list[int],
        neurons: Sequence[Neuron],
        values: Sequence[float],
        mode: Mode,
        sequence: Positioned | None,
    ) -> None:
        super().__init__(site, [neurons[row] for row in rows], sequence)
        self._rows, self._values, self._batch = rows, [values[row] for row in rows], len(neurons)
        self._mode = mode

    def __repr__(self) -> str:
        return f"clamp({self._mode}, {len(self._rows)} rows)"

    def _clamped(self, act: Tensor, columns: list[int] | None) -> Tensor:
        if act.ndim != 3 or act.shape[0] != self._batch:
            raise ValueError(f"clamp_rows: expected passes of {self._batch} rows, got activations {list(act.shape)}")
        rows, neurons = (
            torch.tensor(part, device=act.device)[:, None]
            for part in (self._rows, [neuron.index for neuron in self._neurons])
        )
        where = torch.tensor(range(act.shape[1]) if columns is None else columns, device=act.device)
        values = torch.tensor(self._values, dtype=torch.float64).to(act)[:, None]
        require_finite(values, act)
        clamped = act.clone()
        clamped[rows, where, neurons] = APPLY[self._mode](act[rows, where, neurons], values)
        return clamped
