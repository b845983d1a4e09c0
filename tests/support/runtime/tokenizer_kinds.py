"""Small tokenizers of each kind that models come with, for tests of the text that tokens give."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models

from furiosa_llm.runtime.tokens.tokenizer import Tokenizer

SPECIAL = ("<s>", "</s>", "<|é|>")
_EMOJI = "😀".encode()


def make(vocabulary: list[str], decoder: decoders.Decoder | None, *, words: bool = False) -> Tokenizer:
    """A tokenizer whose tokens are `vocabulary`, then one added token that is not special, then SPECIAL."""
    entries = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    model = models.WordPiece(entries, unk_token="[UNK]") if words else models.BPE(entries, [])
    tokenizer = tokenizers.Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return Tokenizer(tokenizer, {}, None)


def byte_level() -> Tokenizer:
    """As GPT-2's: bytes written as letters; whole words, characters and pieces of characters."""
    letters = _byte_letters()

    def write(data: bytes) -> str:
        return "".join(letters[byte] for byte in data)

    pieces = [
        _EMOJI[:1],
        _EMOJI[:2],
        _EMOJI[2:],
        _EMOJI[1:],
        _EMOJI,
        b" a",
        b"ab",
        b"a\xe2\x82",
        b"\xac b",
        "é".encode(),
    ]
    pieces += ["\N{REPLACEMENT CHARACTER}".encode(), b"x\xff", b"  "]
    return make(
        [write(bytes([byte])) for byte in range(256)] + [write(piece) for piece in pieces], decoders.ByteLevel()
    )


def byte_fallback() -> Tokenizer:
    """As Llama's: pieces with "▁" for spaces, and tokens for the bytes of what has no piece."""
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", "▁", "▁▁", "▁a", "▁b", "a", "b", "é", "▁é", ".", "\N{REPLACEMENT CHARACTER}"]
    return make([*pieces, *(f"<0x{byte:02X}>" for byte in range(256))], decoder)


def metaspace() -> Tokenizer:
    """As T5's: pieces with "▁" for spaces."""
    return make(["▁", "▁a", "▁b", "a", "b", "é", "▁▁", "▁é", "."], decoders.Metaspace())


def word_piece() -> Tokenizer:
    """As BERT's: words, and pieces that continue them."""
    words = ["[UNK]", "a", "b", "é", "##a", "##é", ".", ",", "'", "s", "do", "not", "n't", "##."]
    return make(words, decoders.WordPiece(), words=True)


def suffixed() -> Tokenizer:
    """As the first GPT's: the last piece of a word ends with "</w>"."""
    return make(["a", "b", "é", "a</w>", "b</w>", "é</w>", ".</w>"], decoders.BPEDecoder())


def plain() -> Tokenizer:
    """Without a decoder: tokens are parted by spaces."""
    return make(["a", "b", "é"], None)


def spelled(*tokens: str) -> Tokenizer:
    """Each of `tokens` is one token, which is its own text; all other text is the one behind them, "[UNK]"."""
    return make([*tokens, "[UNK]"], decoders.Fuse(), words=True)


def _byte_letters() -> dict[int, str]:
    """The letters of the byte-level alphabet: printable ones stand for themselves, others are shifted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


KINDS = {kind.__name__: kind() for kind in (byte_level, byte_fallback, metaspace, word_piece, suffixed, plain)}
