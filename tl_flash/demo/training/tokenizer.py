"""A byte-level BPE in which every concept is one token."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tl_flash.demo.training.concepts import TOKENS

BOS, EOS = "<|bos|>", "<|eos|>"


def train_tokenizer(texts: Iterable[str], d_vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose encodings begin with BOS.

    Args:
        texts: the text to learn merges from.
        d_vocab: size of the vocabulary, the 256 bytes and two special tokens included.

    Raises:
        ValueError: a concept came out as more than one token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=d_vocab,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )
    split = [token for token in TOKENS if len(tokenizer.encode(token, add_special_tokens=False)) != 1]
    if split:
        raise ValueError(f"concepts {split} are not single tokens: expected one each; raise d_vocab or give more text")
    return tokenizer
