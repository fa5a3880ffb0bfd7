"""Which tokens stand for a word."""

import pytest

from tests.test_vocab import byte_level, sentence_piece
from tl_flash.decode.wording import given_tokens, shown, tokens_of
from tl_flash.vocab import Vocab

STRINGS = (
    " dog", "dog", " Dog", "DOG", " dogs", " doge", " dogged", "dog's", " cat", "cats", " car", " cars", " cared",
    " city", " cities", " wolf", "wolves", " bus", " buses", " busing", " York", " new", " New", " news", "собака",
    " СОБАКА", "собаками",
    "北京", "京", "ｄｏｇ", " big dog", " run", " running", " visit", " visited", " make", " making",
)  # fmt: skip
VOCAB = Vocab(len(STRINGS), STRINGS)


def found(concept, vocab=VOCAB):
    return {vocab.string(id): weight for id, weight in tokens_of(vocab, concept).items()}


@pytest.mark.parametrize(
    ("word", "whole", "verbal"),
    [
        ("dog", [" dog", "dog", " Dog", "DOG", " dogs", "dog's", "ｄｏｇ"], [" dogged"]),
        ("  DOG ", [" dog", "dog", " Dog", "DOG", " dogs", "dog's", "ｄｏｇ"], [" dogged"]),
        ("car", [" car", " cars"], []),
        ("city", [" city", " cities"], []),
        ("wolf", [" wolf", "wolves"], []),
        ("bus", [" bus", " buses"], []),
        ("run", [" run"], [" running"]),
        ("visit", [" visit"], [" visited"]),
        ("make", [" make"], [" making"]),
        ("Собака", ["собака", " СОБАКА"], []),
        ("北京", ["北京"], []),
        ("big dog", [" big dog"], []),
    ],
)
def test_forms_of_a_word_are_what_the_vocabulary_holds(word, whole, verbal):
    assert found(word) == dict.fromkeys(whole, 1.0) | dict.fromkeys(verbal, 0.5)


def test_the_words_of_a_phrase_count_alike_and_the_last_alone_is_inflected():
    assert found("New York") == {" York": 1.0, " new": 0.5, " New": 0.5}
    both = found(["city", "wolf", "York"])
    assert both == {" York": 1.0, **dict.fromkeys([" city", " cities", " wolf", "wolves"], 0.5)}


def split_at(pieces):
    """A tokenizer that cuts these texts so, and takes the token of any other."""

    def split(text):
        return [STRINGS.index(piece) for piece in pieces[text]] if text in pieces else [STRINGS.index(" new")]

    return split


def test_a_word_of_several_tokens_stands_for_its_first_piece():
    pieces = {" carpet": [" car", "cats"], "carpet": ["京", " car"], " Carpet": [" car"], "Carpet": ["dog"]}
    vocab = Vocab(len(STRINGS), STRINGS, split=split_at(pieces))
    assert found("carpet", vocab) == {" car": 0.25}, "what spells no beginning of the word is left out"
    long = {text: [" car"] for text in (" carxxxxxxxxxx", "carxxxxxxxxxx")}
    with pytest.raises(ValueError, match="nor the first quarter"):
        found("carxxxxxxxxxx", Vocab(len(STRINGS), STRINGS, split=split_at(long)))


def test_both_kinds_of_tokenizer():
    vocab = Vocab.of_tokenizer(byte_level(), d_vocab=10)
    assert found("Dog", vocab) == {"dog": 1.0, " dog": 1.0}
    vocab = Vocab.of_tokenizer(sentence_piece(), d_vocab=13)
    assert found("He", vocab) == {"he": 1.0, " he": 1.0}
    assert found("hehe", vocab) == {" he": 0.25}, "the first piece, since this tokenizer puts a space before any text"


@pytest.mark.parametrize("concept", ["", "  ", [], ["dog", " "]])
def test_an_empty_concept_is_refused(concept):
    with pytest.raises(ValueError, match="concept: expected a word"):
        tokens_of(VOCAB, concept)


def test_what_no_token_spells_is_refused():
    with pytest.raises(ValueError, match="concept 'xyzzy': no token spells 'xyzzy'"):
        tokens_of(VOCAB, "xyzzy")
    with pytest.raises(ValueError, match="no tokenizer"):
        tokens_of(Vocab(5), "dog")
    with pytest.raises(TypeError, match="concept: expected a word"):
        tokens_of(VOCAB, [3])


def test_a_set_is_given_back_as_it_is_shown():
    twins = Vocab(4, ("\ufffd", "\ufffd", " dog", "dog"))
    tokens = {0: 1.0, 2: 0.5, 3: 1.0}
    assert shown(twins, tokens) == {0: 1.0, "dog": 1.0, " dog": 0.5}
    assert given_tokens(twins, shown(twins, tokens)) == tokens
    assert given_tokens(VOCAB, [" dog", 3]) == {0: 1.0, 3: 1.0}


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], ValueError, "at least one token"),
        ([" hippo"], ValueError, "token ' hippo': expected one token"),
        ([999], ValueError, "token 999"),
        (" dog", TypeError, "expected a list"),
        ({" dog": 0}, ValueError, "positive weight of ' dog'"),
        ({" dog": float("nan")}, ValueError, "positive weight"),
        ({" dog": "1"}, TypeError, "expected a number"),
        ({" dog": 1, 0: 2}, ValueError, "given twice"),
    ],
)
def test_tokens_that_do_not_exist_are_refused(tokens, error, message):
    with pytest.raises(error, match=message):
        given_tokens(VOCAB, tokens)
