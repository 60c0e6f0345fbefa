"""OPT's own vocabulary, where a copy lies in `shared/data` beside the checkout; the files are not ours to ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from metaseq_api.tokenizer import Tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not (DATA / "gpt2-vocab.json").is_file(), reason="OPT's tokenizer files are not here")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DATA / "gpt2-vocab.json", DATA / "gpt2-merges.txt", model_vocab_size=50272)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("</s>", [49138, 29, 15698]),
        (".", [4]),
        ("?", [116]),
        ("!", [328]),
        (" the", [5]),
        (" ", [1437]),
        ("\n", [50118]),
        ("\n\n", [50140]),
        ("x\r\n\ry", [1178, 50118, 50118, 219]),
        (
            "The man turned on the faucet so the toilet filled with water.",
            [133, 313, 1224, 15, 5, 856, 17527, 594, 98, 5, 11471, 3820, 19, 514, 4],
        ),
    ],
)
def test_texts_get_metaseqs_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids


def test_ids_decode_as_metaseqs_do(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 50265
    assert tokenizer.decode([2, 133, 313]) == "</s>The man"
    assert tokenizer.decode(range(50265, 50272)) == ""
    assert tokenizer.decode([50260, 50261, 50264]) == "<|endoftext|>madeupword0000<mask>"


def test_offsets_of_metaseqs_regression_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The man turned on the faucet so the toilet filled with water.")
    assert tokenizer.offsets(ids) == [0, 3, 7, 14, 17, 21, 23, 26, 28, 31, 35, 42, 49, 54, 60]


def test_an_emoji_keeps_its_place_when_split_over_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b")
    assert [tokenizer.token_text(i) for i in ids] == ["a", "bytes:\\xf0\\x9f\\x98", "bytes:\\x80", "b"]
    assert tokenizer.offsets(ids) == [0, 1, 1, 2]


def test_the_transformers_tokenizer_agrees(tokenizer: Tokenizer) -> None:
    from tokenizers import ByteLevelBPETokenizer

    oracle = ByteLevelBPETokenizer(str(DATA / "gpt2-vocab.json"), str(DATA / "gpt2-merges.txt"))
    for text in ("Hello, world!  \n\tdef f(x): return x**2", "naïve café — 東京 🗼", " '\"'s don't 1234567 # #", "<s>"):
        assert tokenizer.encode(text) == oracle.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == oracle.decode(oracle.encode(text).ids, False)
