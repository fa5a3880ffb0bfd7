"""What prompts are: texts, conversations, token ids or what a tokenizer returns; and batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_flash.clamps.sites import require_hooks

PromptsLike = Int[Tensor, "prompt position"] | Mapping[str, Any] | Iterable[Any]
"""Whatever `Prompts.of` takes."""
NEUTRAL_PROMPTS = (
    "From my experience,",
    "I think that",
    "One day,",
    "The next thing that I saw was",
    "She looked around and said",
    "He opened the door and found",
    "Let me tell you about",
    "There was a",
    "They talked about",
    "It was about",
    "I would like to",
    "This is the",
    "Yesterday we went to see the",
    "In the morning,",
    "Everyone likes the",
    "My friend has a",
    "We were thinking of",
    "What I want most is",
    "You can see the",
    "The story begins with",
)
"""Twenty beginnings that lead nowhere in particular."""


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, each without padding.

    A text is tokenised as the model's own `to_tokens` does, a beginning-of-sequence token included; a conversation by
    the tokenizer's chat template, which holds every special token that it wants.
    """

    rows: tuple[Int[Tensor, " position"], ...]
    texts: tuple[str | None, ...] = ()
    """What each was, where it was a text."""

    @classmethod
    def of(cls, model: Any, prompts: PromptsLike, *, chat: bool = False) -> Prompts:
        """Tokenise prompts.

        Args:
            model: whose tokenizer, chat template and n_ctx count.
            prompts: several of these, or one tensor or tokenizer's answer for all:

                - texts. One that begins with the beginning-of-sequence token keeps that one alone.
                - token ids without padding, [position] or [prompt, position].
                - what a tokenizer returns, a dict of `input_ids`; its `attention_mask` says what is padding.
                - conversations, each a list of messages (dicts of "role" and "content"), or one such list alone. The
                  model goes on as the assistant, or with the assistant's last message if that is the end.
            chat: each text is what a user says, a conversation of one message.

        Raises:
            TypeError: they are one string, or of another kind; a model without hooks.
            ValueError: there are none, one is empty, or one is longer than the model's n_ctx; an id that the model has
                not; a mask that fits no padding; chat without a chat template, or of token ids.

        Example:
            >>> from tl_flash.clamps import Prompts
            >>> batch = {"input_ids": torch.tensor([[1, 1, 5, 6], [7, 8, 9, 3]]),
            ...          "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
            >>> [row.tolist() for row in Prompts.of(model, batch).rows]
            [[5, 6], [7, 8, 9, 3]]
        """
        require_hooks(model)
        tokenised = [pair for part in _parts(prompts) for pair in _tokenised(model, part, chat)]
        rows = [row.cpu() for _, row in tokenised]
        if not rows or any(len(row) == 0 for row in rows):
            raise ValueError(f"prompts: expected at least one, none of them empty, got {len(rows)}")
        longest = max(map(len, rows))
        if longest > model.cfg.n_ctx:
            raise ValueError(f"prompts: expected at most n_ctx = {model.cfg.n_ctx} tokens, got one of {longest}")
        least, most = (int(torch.cat(rows).aminmax()[at]) for at in (0, 1))
        if least < 0 or most >= model.cfg.d_vocab:
            raise ValueError(
                f"prompts: expected token ids of 0 to {model.cfg.d_vocab - 1}, got {least if least < 0 else most}; "
                "tokenise with this model's own tokenizer"
            )
        return cls(tuple(rows), tuple(text for text, _ in tokenised))

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Int[Tensor, "prompt position"]]]:
        """Prompts of one length together, so that none is ever padded: their numbers, and their tokens.

        Raises:
            ValueError: a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            by_length.setdefault(len(row), []).append(i)
        for group in by_length.values():
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                yield batch, torch.stack([self.rows[i] for i in batch])


def _parts(prompts: Any) -> list[Any]:
    """Prompts one by one, or a batch of them as it came."""
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a list of strings, got one string; write [{prompts!r}]")
    if isinstance(prompts, Mapping) and "input_ids" not in prompts:
        raise TypeError(
            f"prompts: expected texts, or a dict with input_ids, got one of {list(prompts)}; give the texts, such as "
            "list(prompts.values())"
        )
    columns = getattr(prompts, "column_names", getattr(prompts, "columns", None))
    if columns is not None:  # iterating a frame gives the names of its columns
        columns = list(columns)
        raise TypeError(
            f"prompts: expected texts, got a {type(prompts).__name__} of columns {columns}; give one column, such as "
            f"list(prompts[{columns[0] if columns else 'text'!r}])"
        )
    if isinstance(prompts, Mapping) or torch.is_tensor(prompts):
        return [prompts]
    if isinstance(prompts, np.ndarray) and prompts.dtype.kind not in "OU":
        return [prompts]
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts: expected a list of strings or token ids, got {type(prompts).__name__}")
    parts = list(prompts)
    return [parts] if parts and all(map(_is_message, parts)) else parts


def _tokenised(model: Any, part: Any, chat: bool) -> Iterator[tuple[str | None, Tensor]]:
    """The prompts [position] in one text, conversation, tensor or tokenizer's answer, with their texts."""
    if isinstance(part, str):
        yield part, _of_messages(model, [{"role": "user", "content": part}]) if chat else _of_text(model, part)
    elif isinstance(part, list | tuple) and part and all(map(_is_message, part)):
        yield None, _of_messages(model, list(part))
    elif chat:
        raise ValueError(f"chat: expected texts or messages beside chat=True, got {type(part).__name__}, tokenised")
    elif isinstance(part, Mapping) and "input_ids" in part:
        yield from ((None, row) for row in _unpadded(part))
    else:
        yield from ((None, row) for row in torch.atleast_2d(_ids(part)))


def _is_message(part: Any) -> bool:
    return isinstance(part, Mapping) and "role" in part and "content" in part


def _of_text(model: Any, text: str) -> Tensor:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("prompts: this model has no tokenizer to read texts with; give token ids")
    tokens = model.to_tokens(text, truncate=False)[0]
    bos = getattr(tokenizer, "bos_token_id", None)
    doubled = len(tokens) > 1 and int(tokens[0]) == int(tokens[1]) == bos
    return tokens[1:] if doubled and text.startswith(tokenizer.bos_token) else tokens


def _of_messages(model: Any, messages: list[Mapping[str, Any]]) -> Tensor:
    tokenizer = getattr(model, "tokenizer", None)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "chat: this model's tokenizer has no chat template; give texts without chat=True, or set "
            "model.tokenizer.chat_template"
        )
    assert tokenizer is not None
    goes_on = messages[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
    )
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)


def _unpadded(batch: Mapping[str, Any]) -> Iterator[Tensor]:
    """The rows of a tokenizer's answer without what its mask leaves out."""
    given, masks = batch["input_ids"], batch.get("attention_mask")
    if isinstance(given, list | tuple) and given and not isinstance(given[0], int):
        rows = [_ids(row) for row in given]  # of several lengths, where nothing was padded
        kept = [None] * len(rows) if masks is None else [_ids(mask) for mask in masks]
    else:
        rows = list(torch.atleast_2d(_ids(given)))
        kept = [None] * len(rows) if masks is None else list(torch.atleast_2d(_ids(masks)))
    if [len(row) for row in rows] != [
        len(row if mask is None else mask) for row, mask in zip(rows, kept, strict=False)
    ]:
        raise ValueError("attention_mask: expected a number for each of input_ids, got another shape")
    yield from (row if mask is None else row[_real(mask)] for row, mask in zip(rows, kept, strict=True))


def _real(mask: Tensor) -> slice:
    """The part of a row that a mask keeps."""
    places = mask.nonzero()[:, 0]
    first, count = (int(places[0]), len(places)) if len(places) else (0, 0)
    if not ((mask == 0) | (mask == 1)).all() or not mask[first : first + count].all():
        raise ValueError(f"attention_mask: expected one run of ones in each row, got {mask.tolist()}")
    return slice(first, first + count)


def _ids(part: Any) -> Tensor:
    """Token ids [position] or [prompt, position]."""
    if isinstance(part, list | tuple) and part and all(isinstance(id, int) and id is not True for id in part):
        part = torch.tensor(part)
    elif isinstance(part, np.ndarray) and part.dtype != object:
        part = torch.from_numpy(part.astype(np.int64) if part.dtype.kind in "iu" else part)
    if not torch.is_tensor(part):
        raise TypeError(f"prompts: expected strings, messages or token ids, got {type(part).__name__}")
    if part.ndim not in (1, 2) or part.is_floating_point() or part.is_complex() or part.dtype == torch.bool:
        raise TypeError(f"prompts: expected token ids [prompt, position], got {part.dtype} {list(part.shape)}")
    return part.long()
