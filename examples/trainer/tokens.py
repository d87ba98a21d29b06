"""Text as numbers: bytes, or a vocabulary of the tokenizers library. Both have `size`, `encode` and `decode`."""

import os
import shutil
from pathlib import Path

import numpy as np

CHUNK = 1 << 16  # bytes encoded at a time


class Bytes:
    size = 256

    def encode(self, text: bytes) -> np.ndarray:
        """(n,) the bytes themselves."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")


class Vocabulary:
    """A tokenizer.json. Raises ValueError where the file is none."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer  # only where it is asked for

        if not path.is_file():
            raise ValueError(f"there is no tokenizer {path}: --tokenizer takes a tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers 0.23 raises nothing narrower
            raise ValueError(f"{path} is no tokenizer.json ({error}): make one with --vocab") from error
        self.size: int = self.tokenizer.get_vocab_size()

    def encode(self, text: bytes) -> np.ndarray:
        """(n,) the tokens of the text, cut into chunks at line ends to use all cores."""
        lines, chunks = text.decode("utf-8", "replace").splitlines(keepends=True), [""]
        for line in lines:
            if len(chunks[-1]) > CHUNK:
                chunks.append("")
            chunks[-1] += line
        encoded = self.tokenizer.encode_batch(chunks, add_special_tokens=False)
        return np.concatenate([np.array(one.ids, np.int32) for one in encoded])

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens))


def choose(out: Path, given: Path | None, vocab: int | None, text: bytes, resume: bool) -> Bytes | Vocabulary:
    """The run's tokens: bytes, or a tokenizer.json, given or trained on `text`, that `out` keeps for a resumption."""
    kept = out / "tokenizer.json"
    if not (given or vocab):
        return Bytes()
    if given and not resume:
        Vocabulary(given)  # raises before anything is copied
        if given.resolve() != kept.resolve():
            part = out / f".tokenizer.{os.getpid()}"
            shutil.copyfile(given, part)
            os.replace(part, kept)  # whole, for other ranks that read it
    elif given and given.is_file() and kept.is_file() and given.read_bytes() != kept.read_bytes():
        raise ValueError(f"{given} is not the tokenizer that {out} was begun with: leave --tokenizer out")
    elif not resume:
        train(text, vocab or 0, kept)
    return Vocabulary(kept)


def train(text: bytes, vocab: int, path: Path) -> None:
    """Writes a byte-level BPE of at most `vocab` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab < 257:
        raise ValueError(f"--vocab {vocab} leaves nothing to learn: give more than 256, or leave it out for bytes")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.decode("utf-8", "replace").splitlines(keepends=True), trainer)
    part = path.with_name(f".tokenizer.{os.getpid()}")
    tokenizer.save(str(part))
    os.replace(part, path)  # whole, for other ranks, which write the same
