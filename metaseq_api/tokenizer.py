"""Text to token ids and back: byte-level BPE from a vocab.json and merges.txt pair, as OPT's models use it, or from the
one tokenizer.json that holds both.

Knows that ids come in model order with <s>, <pad>, </s>, <unk> in front, and which bytes each id stands for. No text is
special: `</s>` in a prompt is four ordinary characters. Does not know the model, or which ids a request may hold.
"""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from pathlib import Path

from tokenizers import Tokenizer as _Bpe
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from metaseq_api.core.request import BOS_ID
from metaseq_api.errors import TokenizerError

log = logging.getLogger(__name__)

EOS_ID = BOS_ID
"""</s> ends a document, and so stands before the next one too."""
PAD_ID = 1
START_ID = 0
"""<s>: in the vocabulary, but neither trained on nor ever put in front."""
UNK_ID = 3

TOKENIZER_CONFIG = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_prefix_space": False,
    "add_bos_token": True,
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
    "errors": "replace",
}
"""As in OPT's published Hugging Face folders: </s> in front of every text."""
_FRONT = (("<s>", "<BOS>"), ("<pad>", "<PAD>"), ("</s>", "<EOS>"), ("<unk>", "<UNK>"))
_NAMES = (("gpt2-vocab.json", "gpt2-merges.txt"), ("vocab.json", "merges.txt"), ("tokenizer.json",) * 2)


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in GPT-2's files; bytes that do not print are moved to U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(moved)}


_LETTERS = _byte_letters()
_VOCAB, _MERGES = "--vocab-filename (BPE_VOCAB)", "--merges-filename (BPE_MERGES)"


def find_files(folder: Path, vocab: Path | None, merges: Path | None) -> tuple[Path, Path]:
    """The vocab and merges files: those named, else the first known pair beside the checkpoint or one folder up.

    Where all there is is a tokenizer.json, as transformers 5 writes, both are that.

    Raises: TokenizerError saying what was looked for.
    """
    if vocab is not None and merges is not None:
        return vocab, merges
    if vocab is not None or merges is not None:
        given, missing = (_VOCAB, _MERGES) if merges is None else (_MERGES, _VOCAB)
        raise TokenizerError(f"{given} names {vocab or merges} but {missing} is not set; the two go together, set both")
    here = folder if folder.is_dir() else folder.parent
    for place in (here, here.parent):
        for names in _NAMES:
            pair = place / names[0], place / names[1]
            if pair[0].is_file() and pair[1].is_file():
                return pair
    wanted = " nor ".join(" with ".join(dict.fromkeys(names)) for names in _NAMES)
    raise TokenizerError(
        f"no tokenizer: neither {wanted} is in {here} or {here.parent}; "
        f"put OPT's two files there, or name them with {_VOCAB} and {_MERGES}"
    )


def files_to_copy(
    checkpoint: Path, vocab: Path | None, merges: Path | None, *, vocab_size: int, hugging_face: bool
) -> dict[str, bytes]:
    """Read the tokenizer's files, to stand beside another form of the same checkpoint, by the names they have there.

    None where there are none beside the checkpoint, with a word in the log. Raises: TokenizerError where the files
    that were named, or found, are not this model's.
    """
    try:
        pair = find_files(checkpoint, vocab, merges)
    except TokenizerError as error:
        if vocab is not None or merges is not None:
            raise
        log.warning("%s; the model is written without", error)
        return {}
    Tokenizer.load(*pair, model_vocab_size=vocab_size)
    if pair[0] == pair[1]:
        out = {"tokenizer.json": pair[0].read_bytes()}
    else:
        names = _NAMES[1] if hugging_face else _NAMES[0]
        out = {name: path.read_bytes() for name, path in zip(names, pair, strict=True)}
    if hugging_face:
        config = pair[0].with_name("tokenizer_config.json")
        text = json.dumps(TOKENIZER_CONFIG, indent=2, sort_keys=True).encode()
        out["tokenizer_config.json"] = config.read_bytes() if config.is_file() else text
    return out


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(path.read_text("utf-8"))
        if isinstance(vocab, dict) and isinstance(vocab.get("model"), dict):  # a tokenizer.json
            added = {token["content"]: token["id"] for token in vocab.get("added_tokens") or ()}
            vocab = {**vocab["model"]["vocab"], **added}
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise TokenizerError(f"{path}: cannot be read as a JSON vocabulary: {e}") from e
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise TokenizerError(f"{path}: not a vocabulary; wanted one JSON object of token: id")
    tokens = {i: token for token, i in vocab.items()}
    hole = next((i for i in range(len(vocab)) if i not in tokens), None)
    if hole is not None:
        raise TokenizerError(f"{path}: {len(vocab)} tokens, but none has id {hole}; wanted ids 0 to n - 1, each once")
    for i, names in enumerate(_FRONT):
        if tokens.get(i) not in names:
            raise TokenizerError(
                f"{path}: id {i} is {tokens.get(i)!r}, wanted {names[0]!r}; OPT's gpt2-vocab.json is in model order, "
                "GPT-2's own is not"
            )
    lost = [b for letter, b in _LETTERS.items() if letter not in vocab]
    if lost:
        raise TokenizerError(f"{path}: no token for byte 0x{lost[0]:02x}; wanted a byte-level vocabulary")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            pairs = json.loads(text)["model"]["merges"]
            lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
        else:
            lines = text.split("\n")
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise TokenizerError(f"{path}: cannot be read as merges: {e}") from e
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.rstrip("\r").split(" ")
        if pair == [""] or (number == 1 and line.startswith("#version")):
            continue
        if len(pair) != 2:
            raise TokenizerError(f"{path}: line {number} is {line[:60]!r}; wanted two tokens with a space between")
        merges.append((pair[0], pair[1]))
    return merges


class Tokenizer:
    """One vocabulary. Immutable once made, so that any thread may use it."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        self._bpe = _Bpe(BPE(vocab=vocab, merges=merges))
        self._bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokens = sorted(vocab, key=vocab.__getitem__)
        self._bytes = tuple(
            bytes(_LETTERS[c] for c in t) if all(c in _LETTERS for c in t) else t.encode() for t in tokens
        )

    @staticmethod
    def load(vocab: Path, merges: Path, *, model_vocab_size: int) -> Tokenizer:
        """Read and check the two files; the model may have more rows than there are tokens, not fewer.

        Raises: TokenizerError naming the file.
        """
        ids, pairs = _read_vocab(vocab), _read_merges(merges)
        if len(ids) > model_vocab_size:
            raise TokenizerError(
                f"{vocab}: {len(ids)} tokens, but the model's embedding has {model_vocab_size} rows; "
                "name the vocabulary that this model was trained with (BPE_VOCAB, BPE_MERGES)"
            )
        for a, b in pairs:
            if not (a in ids and b in ids and a + b in ids):
                raise TokenizerError(
                    f"{merges}: merges {a!r} with {b!r}, which {vocab} does not hold; they are no pair"
                )
        return Tokenizer(ids, pairs)

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary; a model may have padding rows beyond."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing put in front; CRLF and CR count as LF, half a surrogate pair as U+FFFD."""
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell surrogates one by one: "\ud83d"
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; empty for padding rows of the model."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        """The token by itself: its text; `bytes:\\xe2\\x80` where that is not UTF-8, `token_id:50270` where there is
        none. So all are distinct."""
        if not 0 <= token_id < len(self._bytes):
            return f"token_id:{token_id}"
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included; what is not valid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def offsets(self, ids: Seq[int]) -> list[int]:
        """For each token the index in decode(ids) of the character that its first byte belongs to.

        An empty token gets the index of the unfinished character it interrupts, or of the one to come.
        """
        offsets = StreamOffsets(self)
        return [offsets.push(token_id) for token_id in ids]


class StreamOffsets:
    """Tells one token at a time what `Tokenizer.offsets` tells of all."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def push(self, token_id: int) -> int:
        """The index of the character that this token's first byte belongs to."""
        raw, decoder = self._tokenizer.token_bytes(token_id), self._decoder
        self._num_chars += len(decoder.decode(raw[:1]))
        # the byte ended the last character, or is the last of those held back; these may prove to be two characters
        held = len(decoder.getstate()[0].decode("utf-8", "replace"))
        offset = self._num_chars + held - (1 if held or raw else 0)
        self._num_chars += len(decoder.decode(raw[1:]))
        return offset


class StreamDecoder:
    """Decodes one token at a time; all that it returned, joined, is `decode` of all that it was given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; only an unfinished UTF-8 character is held back."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is still held back: U+FFFD for an unfinished character, or nothing."""
        return self._decoder.decode(b"", final=True)
