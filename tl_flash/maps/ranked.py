"""What searches return: hits, best first, that print as a table and show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self

H = TypeVar("H")


def raising_sign(write_z: float) -> int:
    """1 or -1: which way hook_post has to go to raise what a neuron writes with this z-score."""
    return 1 if write_z > 0 else -1


@dataclass(frozen=True, eq=False, repr=False)
class Ranked(Sequence[H]):
    """A sequence of hits, each a named tuple with a neuron; a slice of it is another of its kind."""

    hits: tuple[H, ...]
    columns: ClassVar[tuple[str, ...]]
    """Of its frame: the fields of a hit."""
    formats: ClassVar[dict[str, str]]
    """How numbers are printed, column by column."""

    @overload
    def __getitem__(self, index: int) -> H: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._part(index) if isinstance(index, slice) else self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[H]:
        return iter(self.hits)

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, a row a hit, columns as the hits' fields, the neuron as its name."""
        return frame_of(self.hits, self.columns)

    def __str__(self) -> str:
        head = self._head()
        if not self.hits:
            return f"{head[0]}: none"
        return "\n".join([*head, self._table().to_string(index=False)])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        from html import escape

        head = "<br>".join(map(escape, self._head()))
        if not self.hits:
            return f"<p>{head}: none</p>"
        return f"<p>{head}</p>{self._table().to_html(index=False, border=0)}"

    def _head(self) -> list[str]:
        """The lines above the table."""
        raise NotImplementedError

    def _part(self, which: slice) -> Self:
        return replace(self, hits=self.hits[which])

    def _table(self) -> pd.DataFrame:
        return shown(self.to_frame(), self.formats)


def frame_of(hits: Sequence[Any], columns: Sequence[str]) -> pd.DataFrame:
    """A pandas frame, a row a hit, the neuron as its name."""
    import pandas as pd

    rows = [{**hit._asdict(), "neuron": str(hit.neuron)} for hit in hits]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def shown(frame: pd.DataFrame, formats: Mapping[str, str]) -> pd.DataFrame:
    """A frame of hits for reading: tokens quoted so that spaces show, numbers short."""
    frame = frame.assign(token=[repr(token) for token in frame["token"]])
    for column, format in formats.items():
        frame[column] = frame[column].map(format.format)
    return frame
