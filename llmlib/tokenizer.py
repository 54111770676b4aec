"""Text to tokens and back: a checkpoint's own tokenizer, a byte-level BPE trained here, or plain bytes."""

from collections.abc import Iterable
from pathlib import Path

from llmlib.data import VOCAB_SIZE, decode, encode
from llmlib.errors import CheckpointError, require


class ByteTokenizer:
    """Every byte of UTF-8 is a token: 256 of them, nothing to train, and nothing that can't be written."""

    vocab_size = VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return encode(text).tolist()

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; bytes that aren't UTF-8 show as �."""
        return decode(tokens)


class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909; over bytes as in GPT-2), by `tokenizers`.

    It starts from the 256 bytes and merges the pair of neighbours that is most frequent in the training text, again
    and again, so that any text can be written and frequent text is short.
    """

    def __init__(self, tokenizer):
        self._tokenizer, self.vocab_size = tokenizer, tokenizer.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn up to vocab_size − 256 merges from `texts`, fewer where they run out of pairs that come twice.

        The same texts give the same merges. ConfigError for a vocab_size below 256.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        require(not isinstance(texts, str), "texts is one string, and must be several: put it in a list")
        require(vocab_size >= 256, f"vocab_size is {vocab_size}, and byte-level BPE starts from 256 bytes")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, file: str | Path) -> "BPETokenizer":
        """Read a tokenizer.json; CheckpointError where it can't be read. No text is cut or padded, whatever it says."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001  (the library raises plain Exception)
            raise CheckpointError(f"{file} can't be read as a tokenizer ({error})") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    def save(self, file: str | Path) -> None:
        """Write a tokenizer.json."""
        self._tokenizer.save(str(file))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that this model puts around one (a beginning of text, say)."""
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


class _FromTransformers:
    """A tokenizer that exists only in an older format, which `transformers` reads."""

    def __init__(self, tokenizer):
        self._tokenizer, self.vocab_size = tokenizer, len(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that this model puts around one."""
        return self._tokenizer.encode(text, add_special_tokens=True)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def load_tokenizer(folder: str | Path):
    """The tokenizer of a checkpoint's folder: tokenizer.json, or the older files through `transformers`.

    It has `encode(text)` → token ids, `decode(tokens)` → text, and `vocab_size`. A missing or broken one is a
    CheckpointError that says what to add. Code that comes with a checkpoint is never run.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return BPETokenizer.load(folder / "tokenizer.json")
    older = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).exists()]
    if not older:
        raise CheckpointError(f"{folder} has no tokenizer.json: copy the model's tokenizer files beside its weights")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise CheckpointError(
            f"{folder} has {older[0]} and no tokenizer.json: pip install transformers to read it"
        ) from None
    try:
        return _FromTransformers(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # noqa: BLE001  (each format fails in its own way)
        raise CheckpointError(f"{folder / older[0]} can't be read as a tokenizer ({error})") from None
