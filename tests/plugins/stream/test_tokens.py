"""Long documents are tokenised in windows: the tokens are those of the whole document."""

from __future__ import annotations

import math
import random
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from clt_plugins import Refused
from clt_stream.identity import special_tokens, tokenizer_identity
from clt_stream.spelling import spelling
from clt_stream.text import tokens as module
from clt_stream.text.stdlib import python_stdlib
from clt_stream.text.tokens import Tokens


@cache
def _stdlib() -> str:
    return "\n".join(text for _, text in python_stdlib()[:60])


def sentences(characters: int) -> str:
    return _stdlib()[:characters]


def byte_level() -> Tokenizer:
    """Like that of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=600, show_progress=False))


def without_words() -> Tokenizer:
    """Like that of Llama 2: merges go over the whole text, with a sign in front of it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False), 3000)


def unigram() -> Tokenizer:
    """Like that of T5: the most probable tokens of a word. (The library's trainer gives another one each time.)"""
    words = ["▁" + word for word in sentences(20_000).split()]
    pieces = Counter(
        word[begin:end] for word in words for begin in range(len(word)) for end in range(begin + 1, begin + 7)
    )
    known = sorted(pieces.items(), key=lambda piece: (-piece[1], piece[0]))[:400]
    total = sum(count for _, count in known)
    scores = [("<unk>", 0.0), *((piece, math.log(count / total)) for piece, count in known)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    """Like that of BERT: lower case, no blanks."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"], show_progress=False))


def trained(tokenizer: Tokenizer, trainer: object, characters: int = 20_000) -> Tokenizer:
    tokenizer.train_from_iterator([sentences(characters)], trainer)
    return tokenizer


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2000)
    monkeypatch.setattr(module, "WINDOW", 1700)
    monkeypatch.setattr(module, "OVERLAPS", (300, 900))


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("make", [byte_level, without_words, unigram, word_piece])
def test_tokens_of_a_long_document_are_those_of_the_whole(make: object) -> None:
    backend = make()  # type: ignore[operator]
    tokens = Tokens(PreTrainedTokenizerFast(tokenizer_object=backend), "text")
    draw = random.Random(0)
    text = sentences(30_000)
    odd = "".join(draw.choices("aé字🙂 \n\tÀ.", k=9000))
    for long in (text, odd, "word " * 3000, "Ünïcödé 字字 🙂\r\n" * 500):
        (ids,) = tokens.of([long])
        assert ids.tolist() == backend.encode(long, add_special_tokens=False).ids


@pytest.mark.usefixtures("small_windows")
def test_short_documents_beside_long_ones_keep_their_order() -> None:
    backend = byte_level()
    tokens = Tokens(PreTrainedTokenizerFast(tokenizer_object=backend), "text")
    texts = ["a", sentences(5000), "", "b" * 1500, "c" * 1500, "d"]
    assert [ids.tolist() for ids in tokens.of(texts)] == [backend.encode(text).ids for text in texts]


@pytest.mark.usefixtures("small_windows")
def test_a_document_whose_windows_never_agree_is_refused() -> None:
    """One token for each 64 letters, counted from the first: no window says the same as another."""
    merges, vocabulary = [], {"a": 0}
    for power in range(6):
        half = "a" * 2**power
        merges.append((half, half))
        vocabulary[half * 2] = power + 1
    backend = Tokenizer(models.BPE(vocabulary, merges))
    tokens = Tokens(PreTrainedTokenizerFast(tokenizer_object=backend), "t.txt")
    with pytest.raises(
        Refused, match=r"^source\.text: a document of 5000 characters in 't\.txt' is too long: .*sample_by"
    ):
        list(tokens.of(["a" * 5000]))


def test_a_tokenizer_sees_no_more_than_a_batch_at_a_time(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So memory is bounded, however long a document is and however many there are."""
    from transformers import AutoTokenizer

    monkeypatch.setattr(module, "BATCH", 2000)
    monkeypatch.setattr(module, "WINDOW", 1700)
    monkeypatch.setattr(module, "OVERLAPS", (300, 900))
    sizes = []

    class Watched:
        def __init__(self, backend: Tokenizer):
            self.backend = backend

        def encode(self, text: str, **options: bool) -> object:
            sizes.append(len(text))
            return self.backend.encode(text, **options)

        def encode_batch_fast(self, texts: list[str], **options: bool) -> object:
            sizes.append(sum(map(len, texts)))
            return self.backend.encode_batch_fast(texts, **options)

        def __getattr__(self, name: str) -> object:
            return getattr(self.backend, name)

    tokens = Tokens(AutoTokenizer.from_pretrained(gpt2), "text")
    tokens.backend = Watched(tokens.backend)
    list(tokens.of([sentences(20_000), *[sentences(900)] * 9]))
    assert max(sizes) <= 2000


def test_tokens_of_the_vocabulary_that_are_listed_as_added_are_spelled_as_the_vocabulary_is() -> None:
    """As Gemma's runs of spaces: with them every part of a character was spelled as the sign for none."""
    known = [
        "<pad>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted({*"\u2581abxDif1=:\n\t"}),
        "\u2581\u2581",
    ]
    vocabulary = {word: number for number, word in enumerate(known)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("\u2581", "\u2581")], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken("\u2581\u2581", normalized=False, special=False), AddedToken("<turn>")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    text = "x  \U0001f680<turn> a"
    ids = wrapped(text, add_special_tokens=False)["input_ids"]
    assert vocabulary["\u2581\u2581"] in ids and max(ids) == len(vocabulary)
    assert b"".join(spelling(wrapped)(ids)) == text.encode()


def test_a_tokenizer_without_a_table_of_added_tokens(monkeypatch):
    """Those of mistral-common have a method of that name, which raises."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<unk>")
    expected = spelling(wrapped)([5, 6, 7])

    def added_tokens_decoder(self):
        raise NotImplementedError

    monkeypatch.setattr(PreTrainedTokenizerFast, "added_tokens_decoder", added_tokens_decoder)
    assert special_tokens(wrapped) == wrapped.all_special_ids
    assert spelling(wrapped)([5, 6, 7]) == expected
    assert tokenizer_identity(wrapped)
