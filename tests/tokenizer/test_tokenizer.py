"""The tokenizer on the demo's small vocabulary, whose every byte has a token of its own, and on made-up bad files."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaseq_api.errors import TokenizerError
from metaseq_api.settings import DEMO
from metaseq_api.tokenizer import StreamDecoder, Tokenizer, find_files

VOCAB, MERGES = DEMO / "vocab.json", DEMO / "merges.txt"
TOKENIZER = Tokenizer.load(VOCAB, MERGES, model_vocab_size=1 << 16)
BYTE_ID = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size) if len(TOKENIZER.token_bytes(i)) == 1}
PADDING_ID = TOKENIZER.vocab_size

any_ids = st.lists(st.integers(0, TOKENIZER.vocab_size + 3), max_size=60)
# mostly pieces of multi-byte characters, so that they are split, cut off and malformed in every way
byte_ids = st.lists(
    st.one_of(st.integers(0x80, 0xFF), st.sampled_from(b"\xe2\x82\xac\xf0\x9f\x98\x80\xed\xa0A")), max_size=24
).map(lambda values: [BYTE_ID[bytes([v])] for v in values])
ids_of_all_kinds = st.one_of(any_ids, byte_ids, st.tuples(any_ids, byte_ids).map(lambda pair: pair[0] + pair[1]))


def test_every_byte_has_a_token() -> None:
    assert sorted(BYTE_ID) == [bytes([b]) for b in range(256)]


@given(st.text(max_size=200))
def test_a_text_survives_encoding_and_decoding(text: str) -> None:
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == plain


def test_every_kind_of_newline_becomes_lf() -> None:
    assert TOKENIZER.encode("a\r\nb\rc\n\r") == TOKENIZER.encode("a\nb\nc\n\n")


def test_special_tokens_in_a_text_are_ordinary_text() -> None:
    for name in ("<s>", "<pad>", "</s>", "<unk>"):
        ids = TOKENIZER.encode(name)
        assert min(ids) > 3
        assert TOKENIZER.decode(ids) == name


def test_special_tokens_decode_to_their_names() -> None:
    assert TOKENIZER.decode([0, 1, 2, 3]) == "<s><pad></s><unk>"


def test_no_space_is_put_in_front() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("word")) == "word"
    assert TOKENIZER.encode("") == []


def test_half_a_surrogate_pair_becomes_a_replacement_character() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud83d")) == "a\ufffd"
    assert TOKENIZER.decode(TOKENIZER.encode("\ud83d\ude00")) == "\U0001f600"


def test_padding_rows_of_the_model_decode_to_nothing() -> None:
    assert TOKENIZER.decode([PADDING_ID, *TOKENIZER.encode("a"), 10**9, -1]) == "a"
    assert TOKENIZER.token_bytes(PADDING_ID) == b""


def test_token_texts_are_distinct_and_spell_out_what_is_not_utf_8() -> None:
    texts = [TOKENIZER.token_text(i) for i in range(TOKENIZER.vocab_size)]
    assert len(set(texts)) == TOKENIZER.vocab_size
    assert TOKENIZER.token_text(BYTE_ID[b"\xe2"]) == "bytes:\\xe2"
    assert TOKENIZER.token_text(BYTE_ID[b"A"]) == "A"
    assert TOKENIZER.token_text(PADDING_ID) == f"token_id:{PADDING_ID}"


@given(ids_of_all_kinds)
@settings(max_examples=300)
def test_a_stream_returns_what_decode_returns(ids: list[int]) -> None:
    stream = StreamDecoder(TOKENIZER)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(ids)


@given(st.text(max_size=60))
def test_a_stream_holds_back_less_than_one_character(text: str) -> None:
    ids = TOKENIZER.encode(text)
    stream, seen, raw = StreamDecoder(TOKENIZER), "", b""
    for i in ids:
        seen += stream.push(i)
        raw += TOKENIZER.token_bytes(i)
        assert 0 <= len(raw) - len(seen.encode()) < 4
    assert stream.finish() == ""


def reference_offsets(ids: list[int]) -> list[int]:
    """By decoding every prefix of the bytes: a byte lies in the last character of the shortest text that ends in it."""
    out, raw = [], b""
    for i in ids:
        token = TOKENIZER.token_bytes(i)
        if token:
            out.append(len((raw + token[:1]).decode("utf-8", "replace")) - 1)
        raw += token
    return out


@given(ids_of_all_kinds.map(lambda ids: [i for i in ids if TOKENIZER.token_bytes(i)]))
@settings(max_examples=300)
def test_an_offset_is_the_character_of_the_tokens_first_byte(ids: list[int]) -> None:
    assert TOKENIZER.offsets(ids) == reference_offsets(ids)


def test_offsets_of_a_split_character_are_all_its_own() -> None:
    ids = [BYTE_ID[b"x"], *(BYTE_ID[bytes([b])] for b in "€".encode()), PADDING_ID, BYTE_ID[b"y"]]
    assert TOKENIZER.decode(ids) == "x€y"
    assert TOKENIZER.offsets(ids) == [0, 1, 1, 1, 2, 2]


def test_offsets_cut_the_text_into_its_tokens() -> None:
    ids = TOKENIZER.encode("Return the value of the file descriptor.")
    offsets = TOKENIZER.offsets(ids)
    text = TOKENIZER.decode(ids)
    assert [text[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == [
        TOKENIZER.decode([i]) for i in ids
    ]


def test_threads_encode_alike() -> None:
    texts = [f"def method_{i}(self): return {i} * 'ä€'" for i in range(50)]
    wanted = [TOKENIZER.encode(t) for t in texts]
    found: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: found.append([TOKENIZER.encode(t) for t in texts])) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert found == [wanted] * 4


# files


def vocabulary() -> dict[str, int]:
    loaded: dict[str, int] = json.loads(VOCAB.read_text("utf-8"))
    return loaded


def refused(folder: Path, vocab: object, merges: str | None = None, rows: int = 1 << 16) -> str:
    """The message with which a vocabulary (an object for JSON, or raw text) is refused."""
    a, b = folder / "vocab.json", folder / "merges.txt"
    a.write_text(vocab if isinstance(vocab, str) else json.dumps(vocab), "utf-8")
    b.write_text(MERGES.read_text("utf-8") if merges is None else merges, "utf-8")
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(a, b, model_vocab_size=rows)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    size = TOKENIZER.vocab_size
    assert Tokenizer.load(VOCAB, MERGES, model_vocab_size=size).vocab_size == size
    message = refused(tmp_path, vocabulary(), rows=size - 1)
    assert str(tmp_path / "vocab.json") in message
    assert f"{size} tokens" in message
    assert f"{size - 1} rows" in message


def test_a_hole_in_the_ids_is_refused(tmp_path: Path) -> None:
    vocab = vocabulary()
    last = max(vocab, key=vocab.__getitem__)
    assert "none has id" in refused(tmp_path, vocab | {last: vocab[last] + 5})
    assert "none has id" in refused(tmp_path, vocab | {last: 7})


def test_ids_in_another_order_than_the_models_are_refused(tmp_path: Path) -> None:
    vocab = vocabulary()
    vocab["</s>"], vocab["<s>"] = vocab["<s>"], vocab["</s>"]
    assert "model order" in refused(tmp_path, vocab)


def test_a_vocabulary_without_some_byte_is_refused(tmp_path: Path) -> None:
    vocab = {("two letters" if token == "Ġ" else token): i for token, i in vocabulary().items()}
    assert "byte 0x20" in refused(tmp_path, vocab)


@pytest.mark.parametrize("vocab", ["{", "[]", '{"a": "b"}', '{"a": true}', '{"a": 1.5}'])
def test_what_is_not_a_vocabulary_is_refused_by_name(tmp_path: Path, vocab: str) -> None:
    assert str(tmp_path / "vocab.json") in refused(tmp_path, vocab)


@pytest.mark.parametrize("merges", ["#version: 0.2\nonlyone\n", "a b c\n"])
def test_a_line_that_is_no_merge_is_refused_by_number(tmp_path: Path, merges: str) -> None:
    message = refused(tmp_path, vocabulary(), merges)
    assert str(tmp_path / "merges.txt") in message
    assert f"line {2 if merges.startswith('#') else 1}" in message


def test_merges_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, vocabulary(), "#version: 0.2\nĠ ŁŁ\n")
    assert str(tmp_path / "merges.txt") in message
    assert str(tmp_path / "vocab.json") in message


def test_merges_may_start_with_a_number_sign(tmp_path: Path) -> None:
    vocab = vocabulary()
    a, b = tmp_path / "vocab.json", tmp_path / "merges.txt"
    a.write_text(json.dumps({**vocab, "#*": len(vocab)}), "utf-8")
    b.write_text("#version: 0.2\r\n# *\r\n", "utf-8")
    assert Tokenizer.load(a, b, model_vocab_size=1 << 16).encode("#*") == [len(vocab)]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"nowhere\.json"):
        Tokenizer.load(tmp_path / "nowhere.json", MERGES, model_vocab_size=1 << 16)
    with pytest.raises(TokenizerError, match=r"nowhere\.txt"):
        Tokenizer.load(VOCAB, tmp_path / "nowhere.txt", model_vocab_size=1 << 16)


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_named_files_win_over_found_ones(tmp_path: Path) -> None:
    put(tmp_path, "vocab.json", "merges.txt")
    assert find_files(tmp_path, VOCAB, MERGES) == (VOCAB, MERGES)


def test_files_are_found_beside_the_checkpoint_then_one_folder_up(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    put(folder, "reshard.pt")
    put(tmp_path, "gpt2-vocab.json", "gpt2-merges.txt")
    above = tmp_path / "gpt2-vocab.json", tmp_path / "gpt2-merges.txt"
    assert find_files(folder, None, None) == above
    assert find_files(folder / "reshard.pt", None, None) == above
    put(folder, "vocab.json")
    assert find_files(folder, None, None) == above
    put(folder, "merges.txt")
    assert find_files(folder, None, None) == (folder / "vocab.json", folder / "merges.txt")
    put(folder, "gpt2-vocab.json", "gpt2-merges.txt")
    assert find_files(folder, None, None) == (folder / "gpt2-vocab.json", folder / "gpt2-merges.txt")


def test_one_named_file_without_the_other_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"\(BPE_MERGES\) is not set"):
        find_files(tmp_path, VOCAB, None)
    with pytest.raises(TokenizerError, match=r"\(BPE_VOCAB\) is not set"):
        find_files(tmp_path, None, MERGES)


def test_no_files_at_all_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as error:
        find_files(tmp_path / "checkpoint", None, None)
    for word in ("gpt2-vocab.json", "merges.txt", "BPE_VOCAB", "BPE_MERGES", str(tmp_path)):
        assert word in str(error.value)


def tokenizer_json(folder: Path, **changes: object) -> Path:
    pairs = [line.split(" ") for line in MERGES.read_text("utf-8").splitlines()[1:] if line]
    model = {"type": "BPE", "vocab": json.loads(VOCAB.read_text("utf-8")), "merges": pairs} | changes
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}), "utf-8")
    return path


def test_one_tokenizer_json_is_as_good_as_the_pair(tmp_path: Path) -> None:
    path = tokenizer_json(tmp_path)
    assert find_files(tmp_path, None, None) == (path, path)
    for merges in (None, [line for line in MERGES.read_text("utf-8").splitlines()[1:] if line]):
        path = path if merges is None else tokenizer_json(tmp_path, merges=merges)
        found = Tokenizer.load(path, path, model_vocab_size=1 << 16)
        text = "Return the string of naïve 東京, twice."
        assert found.vocab_size == TOKENIZER.vocab_size
        assert found.encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize("changes", [{"vocab": 3}, {"merges": None}, {"merges": [1]}, {"merges": [["a"]]}])
def test_a_tokenizer_json_that_is_none_is_named(changes: dict[str, object], tmp_path: Path) -> None:
    path = tokenizer_json(tmp_path, **changes)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        Tokenizer.load(path, path, model_vocab_size=1 << 16)
