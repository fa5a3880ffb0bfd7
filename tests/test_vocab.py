import pickle

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_flash.vocab import Vocab


def byte_level():
    pieces = {"d": 0, "o": 1, "g": 2, "Ġ": 3, "do": 4, "dog": 5, "Ġdog": 6, "Ġc": 7, "Ã": 8, "Â": 9}
    merges = [("d", "o"), ("do", "g"), ("Ġ", "dog")]
    model = Tokenizer(models.BPE(vocab=pieces, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model)


def sentence_piece():
    pieces = {"<unk>": 0, "<0x41>": 1, "▁": 2, "h": 3, "e": 4, "he": 5, "▁he": 6, "▁▁": 7, "A": 9}
    merges = [("h", "e"), ("▁", "he"), ("▁", "▁")]
    model = Tokenizer(models.BPE(vocab=pieces, merges=merges, unk_token="<unk>", byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")


def test_strings_keep_their_space():
    vocab = Vocab.of_tokenizer(byte_level(), d_vocab=10)
    assert vocab.string(5) == "dog" and vocab.string(6) == " dog"
    assert vocab.id("dog") == 5 and vocab.id(" dog") == 6 and vocab.id(6) == 6


def test_sentence_piece_strings_keep_their_space_too():
    tokenizer = sentence_piece()
    assert tokenizer.decode([6]) == tokenizer.decode([5]) == "he", "else this test shows nothing"
    vocab = Vocab.of_tokenizer(tokenizer, d_vocab=10)
    assert [vocab.string(id) for id in (1, 2, 5, 6, 7)] == ["<0x41>", " ", "he", " he", "  "]
    assert vocab.id("A") == 9


def test_holes_and_padding_are_nameless():
    assert Vocab.of_tokenizer(sentence_piece(), d_vocab=13).nameless() == [8, 10, 11, 12]
    assert Vocab.of_tokenizer(None, d_vocab=13).nameless() == []


def test_a_text_of_several_tokens_shows_its_pieces():
    vocab = Vocab.of_tokenizer(byte_level(), d_vocab=10)
    with pytest.raises(ValueError, match=r"it is 2: \['dog', ' dog'\]"):
        vocab.id("dog dog")


def test_a_missing_space_is_pointed_out():
    with pytest.raises(ValueError, match="did you mean ' c'"):
        Vocab.of_tokenizer(byte_level(), d_vocab=10).id("c")


def test_a_string_of_two_tokens_asks_for_the_id():
    with pytest.raises(ValueError, match=r"2 tokens print so, ids \[8, 9\]"):
        Vocab.of_tokenizer(byte_level(), d_vocab=10).id("�")


def test_without_a_tokenizer_ids_serve():
    vocab = Vocab.of_tokenizer(None, d_vocab=10)
    assert vocab.string(3) == "<3>" and vocab.id(3) == 3
    with pytest.raises(ValueError, match="no tokenizer; give the token's id"):
        vocab.id(" dog")


@pytest.mark.parametrize("id", [-1, 10])
def test_ids_out_of_range_are_refused(id):
    with pytest.raises(ValueError, match="from 0 to 9"):
        Vocab(10).id(id)


@pytest.mark.parametrize("token", [1.0, None, True])
def test_other_tokens_are_refused(token):
    with pytest.raises(TypeError, match="a string or an id"):
        Vocab(10).id(token)


def test_one_string_is_no_list_of_tokens():
    with pytest.raises(TypeError, match="expected a list"):
        Vocab(10).ids(" dog")


def test_the_id_of_a_zero_direction_is_no_tokens():
    vocab = Vocab.of_tokenizer(["a", "b"], d_vocab=2)
    assert vocab.string(-1) == "<none>" == vocab.names[-1] and list(vocab.names[:2]) == ["a", "b"]
    with pytest.raises(ValueError, match="from 0 to 1"):
        vocab.id(-1)


# Other tokenizers


class Tiktoken:
    """What tiktoken's Encoding offers, with a hole before the last, special token."""

    n_vocab = 5
    _words = {0: "a", 1: " dog", 2: " cat", 4: "<|end|>"}

    def decode(self, ids):
        return "".join(self._words[id] for id in ids)

    def encode(self, text):
        return [1, 2] if text == " dog cat" else [0]


def test_the_tokenizers_package_is_read_as_transformers_is():
    for wrapped in (byte_level(), sentence_piece()):
        plain = Vocab.of_tokenizer(wrapped.backend_tokenizer, d_vocab=13)
        assert plain == Vocab.of_tokenizer(wrapped, d_vocab=13)
        with pytest.raises(ValueError, match=r"it is 2: "):
            plain.id("hehe" if plain.string(5) == "he" else "dog dog")


def test_tiktoken_is_read_and_its_holes_are_nameless():
    vocab = Vocab.of_tokenizer(Tiktoken(), d_vocab=6)
    assert vocab.strings == ("a", " dog", " cat", None, "<|end|>") and vocab.nameless() == [3, 5]
    with pytest.raises(ValueError, match=r"it is 2: \[' dog', ' cat'\]"):
        vocab.id(" dog cat")


def test_sentencepiece_itself_is_read(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("the dog saw a cat and the cat ran to the red house\n" * 20)
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=22, byte_fallback=False, minloglevel=2
    )
    model = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    vocab = Vocab.of_tokenizer(model, d_vocab=22)
    assert any(string.startswith(" ") for string in vocab.strings)
    assert vocab.strings[0] == "<unk>" and not any("▁" in string for string in vocab.strings)


@pytest.mark.parametrize("table", [["a", "b"], ("a", "b"), {"a": 0, "b": 1}, {0: "a", 1: "b"}])
def test_a_table_of_strings_is_a_tokenizer(table):
    assert Vocab.of_tokenizer(table, d_vocab=3).strings == ("a", "b")


@pytest.mark.parametrize(
    ("tokenizer", "error", "message"),
    [
        ("gpt2", TypeError, "str is of no known kind"),
        (object(), TypeError, "object is of no known kind; expected one of transformers"),
        ([1, 2], ValueError, "strings with ids from 0, got 1 with 0"),
        ({"a": 0, "b": 0}, ValueError, "one string for each id"),
        ({"a": -1}, ValueError, "ids from 0"),
    ],
)
def test_what_is_no_tokenizer_is_refused_by_name(tokenizer, error, message):
    with pytest.raises(error, match=message):
        Vocab.of_tokenizer(tokenizer, d_vocab=3)


def test_a_pickled_vocabulary_leaves_the_tokenizer_behind():
    vocab = Vocab.of_tokenizer(byte_level(), d_vocab=12)
    vocab.names, vocab.id("dog")  # noqa: B018 - caches that a pickle could carry along
    again = pickle.loads(pickle.dumps(vocab))
    assert again == vocab and again.id(" dog") == 6 and again.nameless() == [10, 11]
    assert b"Tokenizer" not in pickle.dumps(vocab)
