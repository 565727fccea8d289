"""Text to token ids and back: bytes, or a vocabulary that the `tokenizers` library reads."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from palme_xt import tokens

TOKENIZER = "tokenizer.json"
SPECIAL_TOKENS = "tokenizer_config.json"

# BOS and EOS of Llama, BART, Gemma, CLIP, GPT-2, BERT and others, in the order in which they are looked for.
KNOWN_ENDS = (
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<|endoftext|>", "<|endoftext|>"),
    ("[CLS]", "[SEP]"),
    ("[BOS]", "[EOS]"),
)


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or that does not say where a text begins and ends."""


class Tokenizer(Protocol):
    """What training and captioning need to know of a vocabulary; ids are `0 .. num_tokens - 1`."""

    bos: int
    eos: int
    num_tokens: int

    def encode(self, text: str) -> list[int]:
        """Token ids: BOS, the text, EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids up to the first EOS."""

    def pieces(self) -> Callable[[int], str]:
        """A function that takes the ids of one text in turn and returns the text that each completes, '' often.

        EOS completes whatever is left over.
        """

    def files(self) -> dict[str, bytes]:
        """What `read_tokenizer` needs in a folder, by file name."""


class ByteTokenizer:
    """UTF-8 bytes, BOS and EOS: `palme_xt.tokens`."""

    bos, eos, num_tokens = tokens.BOS, tokens.EOS, tokens.NUM_TOKENS

    def encode(self, text: str) -> list[int]:
        """Token ids: BOS, the UTF-8 bytes, EOS."""
        return [tokens.BOS, *text.encode(), tokens.EOS]

    def decode(self, ids: Iterable[int]) -> str:
        """As `tokens.decode`."""
        return tokens.decode(ids)

    def pieces(self) -> Callable[[int], str]:
        """A function that takes a byte and returns the character that it completes, or ''."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(bytes([token] * (0 <= token < 256)), final=token == tokens.EOS)

    def files(self) -> dict[str, bytes]:
        """Nothing: a folder without a tokenizer's files holds a model of bytes."""
        return {}


class VocabularyTokenizer:
    """A vocabulary of the `tokenizers` library (`tokenizer.json`).

    Args:
        tokenizer: a `tokenizers.Tokenizer`. Its own post-processing is not used: BOS and EOS are put around each text.
        bos_token: the token that begins each text, `<s>`, say; by default the first known pair that it has.
        eos_token: the token that ends each text.
        name: of the tokenizer, in errors.

    Raises:
        TokenizerError: the vocabulary has no such token.
    """

    def __init__(
        self, tokenizer: Any, bos_token: str | None = None, eos_token: str | None = None, *, name: str = TOKENIZER
    ) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # a caption that spells out EOS does not end there
        known = next((pair for pair in KNOWN_ENDS if all(tokenizer.token_to_id(end) is not None for end in pair)), None)
        self.bos_token, self.eos_token = bos_token or (known or ("", ""))[0], eos_token or (known or ("", ""))[1]
        for option, token in ("bos_token", self.bos_token), ("eos_token", self.eos_token):
            if not token or tokenizer.token_to_id(token) is None:
                found = f"{token!r} is not in the vocabulary of {name}" if token else f"{name} has no usual one"
                raise TokenizerError(f"{option}: {found}; name the token that begins or ends a text with --{option}")
        self.bos: int = tokenizer.token_to_id(self.bos_token)
        self.eos: int = tokenizer.token_to_id(self.eos_token)
        self.num_tokens: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # which the library does not pickle

    def encode(self, text: str) -> list[int]:
        """Token ids: BOS, the text, EOS."""
        return [self.bos, *self._tokenizer.encode(text, add_special_tokens=False).ids, self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids up to the first EOS, without special tokens; unknown ids are skipped."""
        kept = []
        for token in ids:
            if token == self.eos:
                break
            if 0 <= token < self.num_tokens:
                kept.append(token)
        return str(self._tokenizer.decode(kept, skip_special_tokens=True))

    def pieces(self) -> Callable[[int], str]:
        """A function that takes the ids of one text in turn and returns the text that each completes, '' often."""
        # Not the DecodeStream of tokenizers 0.23: it raises at broken runs of bytes, and keeps the end of a text back.
        ids: list[int] = []
        seen = shown = ""

        def piece(token: int) -> str:
            nonlocal seen, shown
            ids.append(token)
            before, seen = seen, self.decode(ids)
            # What may still change: half a character, and a run of byte tokens, which is text only if all of it is.
            byte = (self._tokenizer.id_to_token(token) or "").startswith("<0x") if token >= 0 else False
            if token != self.eos and (byte or seen == before or seen.endswith("\ufffd")):
                return ""
            new, shown = seen[len(shown) :], seen
            return new

        return piece

    def files(self) -> dict[str, bytes]:
        """`tokenizer.json` and `tokenizer_config.json`, as Hugging Face libraries name them."""
        special = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        return {
            TOKENIZER: self._tokenizer.to_str(pretty=True).encode(),
            SPECIAL_TOKENS: json.dumps(special, indent=2).encode() + b"\n",
        }


def load_tokenizer(
    file_or_name: str | None, bos_token: str | None = None, eos_token: str | None = None
) -> ByteTokenizer | VocabularyTokenizer:
    """The tokenizer of a `tokenizer.json` file, or of a repository on the hub; None: bytes.

    Raises:
        TokenizerError: it cannot be read, or has no token that begins or ends a text.
    """
    if file_or_name is None:
        if bos_token or eos_token:
            raise TokenizerError(
                f"bos_token={bos_token!r}, eos_token={eos_token!r} go with a tokenizer: bytes have both"
            )
        return ByteTokenizer()
    from tokenizers import Tokenizer as Vocabulary

    path = Path(file_or_name)
    path = path / TOKENIZER if path.is_dir() else path
    try:
        vocabulary = Vocabulary.from_file(str(path)) if path.is_file() else Vocabulary.from_pretrained(file_or_name)
    except Exception as error:  # the library raises bare Exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = (
            "is not a file of the tokenizers library" if path.is_file() else "is neither a file nor a name on the hub"
        )
        raise TokenizerError(f"tokenizer={file_or_name} {kind} that can be read: {reason}") from error
    return VocabularyTokenizer(vocabulary, bos_token, eos_token, name=file_or_name)


def read_tokenizer(folder: Path) -> ByteTokenizer | VocabularyTokenizer:
    """The tokenizer of a model folder: that of its `tokenizer.json`, or bytes where there is none.

    Raises:
        TokenizerError: its files are damaged.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return ByteTokenizer()
    special: dict[str, Any] = {}
    if (folder / SPECIAL_TOKENS).is_file():
        try:
            special = json.loads((folder / SPECIAL_TOKENS).read_text())
            ends = [special[name] for name in ("bos_token", "eos_token")]
            # Hugging Face libraries also write tokens as objects.
            special = dict(zip(("bos", "eos"), [e["content"] if isinstance(e, dict) else e for e in ends], strict=True))
            if not all(isinstance(end, str | None) for end in special.values()):
                raise TypeError("they are not text")
        except (ValueError, KeyError, TypeError) as error:
            raise TokenizerError(f"{folder / SPECIAL_TOKENS} does not name bos_token and eos_token: {error}") from error
    return load_tokenizer(str(path), special.get("bos"), special.get("eos"))
