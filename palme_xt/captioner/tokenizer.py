"""Convert text to token ids and back, as bytes or with a vocabulary of the `tokenizers` library."""

import json
import re
import warnings
from collections.abc import Callable, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from palme_xt import tokens
from palme_xt.storage.files import explained

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
    """Raised if a tokenizer cannot be read, or its BOS or EOS is unknown."""


class Tokenizer(Protocol):
    """The methods of a vocabulary that training and captioning use. Its ids are `0 .. num_tokens - 1`."""

    bos: int
    eos: int
    num_tokens: int

    def encode(self, text: str) -> list[int]:
        """Return token ids: BOS, the text, EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids up to the first EOS, without special tokens and unknown ids."""

    def round_trip(self, text: str) -> str:
        """Return what a text becomes when it is encoded and decoded: the most that a model can learn to write."""
        return self.decode(self.encode(text)[1:])

    def files(self) -> dict[str, bytes]:
        """Return the files, by name, from which `read_tokenizer` restores this tokenizer. Bytes need none."""
        return {}

    def pieces(self) -> Callable[[int], str]:
        """Return a function that takes the ids of one text in turn and returns the text that each completes, if any.

        EOS completes whatever is left.
        """
        # DecodeStream of tokenizers 0.23 raises an error at invalid UTF-8, and never returns the end of such a text.
        ids: list[int] = []
        seen = shown = ""

        def piece(token: int) -> str:
            nonlocal seen, shown
            ids.append(token)
            before, seen = seen, self.decode(ids)
            if token != self.eos and (seen == before or seen.endswith("\ufffd") or self._may_change(token)):
                return ""
            new, shown = seen[len(shown) :], seen
            return new

        return piece

    def _may_change(self, token: int) -> bool:
        """Return whether the following tokens may change the text of this one."""
        return False


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, BOS and EOS, as in `palme_xt.tokens`."""

    bos, eos, num_tokens = tokens.BOS, tokens.EOS, tokens.NUM_TOKENS

    def encode(self, text: str) -> list[int]:
        """Return token ids: BOS, the bytes, EOS."""
        return [self.bos, *text.encode(), self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text, as `tokens.decode` does."""
        return tokens.decode(ids)


class VocabularyTokenizer(Tokenizer):
    """A vocabulary of the `tokenizers` library (`tokenizer.json`).

    Args:
        tokenizer: A `tokenizers.Tokenizer`. Instead of its own post-processing, BOS and EOS are put around each text.
        bos_token: The token that begins each text, such as `<s>`. Defaults to that of the first known pair it has.
        eos_token: The token that ends each text. The default is chosen in the same way.
        name: The name of the tokenizer in errors.

    Raises:
        TokenizerError: If the vocabulary has no such token.
    """

    def __init__(
        self, tokenizer: Any, bos_token: str | None = None, eos_token: str | None = None, *, name: str = TOKENIZER
    ) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        vocabulary: dict[str | None, int] = tokenizer.get_vocab(with_added_tokens=True)
        known = next((pair for pair in KNOWN_ENDS if vocabulary.keys() >= {*pair}), (None, None))
        self.bos_token, self.eos_token = bos_token or known[0], eos_token or known[1]
        for option, token in ("bos_token", self.bos_token), ("eos_token", self.eos_token):
            if token not in vocabulary:
                raise TokenizerError(f"{option}={token!r} must be a token of {name}: choose one with --{option}")
        self.bos, self.eos = vocabulary[self.bos_token], vocabulary[self.eos_token]
        self.num_tokens = max(vocabulary.values()) + 1  # ids may have gaps

    def encode(self, text: str) -> list[int]:
        """Return token ids: BOS, the text, EOS."""
        # A caption that spells out EOS must not end there. This is set here, because the library does not pickle it.
        self._tokenizer.encode_special_tokens = True
        return [self.bos, *self._tokenizer.encode(text, add_special_tokens=False).ids, self.eos]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids up to the first EOS, without special tokens and unknown ids."""
        until_eos = takewhile(lambda token: token != self.eos, ids)
        known = [token for token in until_eos if 0 <= token < self.num_tokens]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def _may_change(self, token: int) -> bool:
        # Where bytes stand for unknown characters, a sequence of them is text only if all of it is valid UTF-8.
        return token >= 0 and (self._tokenizer.id_to_token(token) or "").startswith("<0x")

    def files(self) -> dict[str, bytes]:
        """Return `tokenizer.json` and `tokenizer_config.json`, as Hugging Face libraries name them."""
        special = json.dumps({"bos_token": self.bos_token, "eos_token": self.eos_token}, indent=2) + "\n"
        return {TOKENIZER: self._tokenizer.to_str(pretty=True).encode(), SPECIAL_TOKENS: special.encode()}


def load_tokenizer(file_or_name: str | None, bos_token: str | None = None, eos_token: str | None = None) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json` file or of a repository on the hub, or the byte tokenizer for None.

    Raises:
        TokenizerError: If the tokenizer cannot be read, or its BOS or EOS is unknown.
    """
    if file_or_name is None:
        if bos_token or eos_token:
            raise TokenizerError(f"bos_token={bos_token!r}, eos_token={eos_token!r} need a tokenizer: bytes have both")
        return ByteTokenizer()
    from tokenizers import Tokenizer as Vocabulary

    path = Path(file_or_name)
    path = path / TOKENIZER if path.is_dir() else path
    may_be_on_the_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", file_or_name) and path.suffix != ".json"
    rule = "must be a file of the tokenizers library or a name on the hub"
    with explained(f"tokenizer={file_or_name} {rule}", TokenizerError):
        # The hub is not asked for what must be a file, because that may take half a minute.
        local = path.is_file() or not may_be_on_the_hub
        vocabulary = Vocabulary.from_file(str(path)) if local else Vocabulary.from_pretrained(file_or_name)
    return VocabularyTokenizer(vocabulary, bos_token, eos_token, name=file_or_name)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model folder: that of its `tokenizer.json`, or the byte tokenizer if it has none.

    Raises:
        TokenizerError: If its files are damaged.
    """
    path, special = folder / TOKENIZER, folder / SPECIAL_TOKENS
    if not path.is_file():
        return ByteTokenizer()
    if not special.is_file():
        return load_tokenizer(str(path))
    with explained(f"{special} does not name bos_token and eos_token", TokenizerError):
        values = json.loads(special.read_text())
        ends = [values[name] for name in ("bos_token", "eos_token")]
        # Hugging Face libraries may write tokens as objects.
        ends = [end["content"] if isinstance(end, dict) else end for end in ends]
    return load_tokenizer(str(path), *(None if end is None else str(end) for end in ends))


def warn_if_lossy(tokenizer: Tokenizer, captions: Iterable[str]) -> None:
    """Warn, with an example, if the tokenizer does not reproduce some captions."""
    texts = list(captions)
    if changed := [(text, found) for text in texts if (found := tokenizer.round_trip(text)) != text]:
        text, found = changed[0]
        example = f"{text!r} becomes {found!r}, which is all that the model can learn to write"
        message = f"the tokenizer does not reproduce {len(changed)} of {len(texts)} held-out captions: {example}"
        warnings.warn(message, stacklevel=2)
