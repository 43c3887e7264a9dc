"""Train the shipped `tokenizer.json`: run by hand, ``python -m ringserve.needle.train_tokenizer``.

Byte-level BPE. The pre-tokenizer cuts a text so that a prefix that ends at a natural place (after a word,
a digit, a punctuation mark or a line) tokenises to a prefix of the whole text's tokens; a question can then
repeat the start of a sentence and land on the same tokens:

    "def f_1(x):\\n        return 42"  ->  def| f|_|1|(|x|)|:|\\n|       | return| |4|2
"""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 6144
END_OF_TEXT = "<|endoftext|>"
LONGEST_TOKEN = 16
BYTES_OF_CODE = 12_000_000
BYTES_OF_ENGLISH = 12_000_000

# A word with its space; one digit; one mark; one line break; a run of blanks that leaves the last space to
# a following word; any other run of blanks.
PRETOKENS = (
    r" ?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"|[^\s\p{L}\p{M}\p{N}]"
    r"|[\r\n]"
    r"|[^\S\r\n]+(?= [\p{L}\p{M}])"
    r"|[^\S\r\n]+"
)


def empty_tokenizer() -> Tokenizer:
    """The tokenizer without its merges: no normalizer, so that every string comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def texts(patterns: list[tuple[Path, str]], limit: int) -> Iterator[str]:
    """The UTF-8 files that the glob patterns name, in name order, at most `limit` bytes in all."""
    for root, pattern in patterns:
        for path in sorted(root.glob(pattern)):
            if limit <= 0:
                return
            if not path.is_file() or "test" in str(path):
                continue
            try:
                text = path.read_text(encoding="utf-8")[:200_000]
            except (UnicodeDecodeError, OSError):
                continue
            limit -= len(text)
            yield text


def corpus() -> Iterator[str]:
    """Source code of the standard library, and English: documentation, licences, package descriptions."""
    paths = sysconfig.get_paths()
    library, packages = Path(paths["stdlib"]), Path(paths["purelib"])
    share = Path("/usr/share")
    yield from texts([(library, "*.py"), (library, "*/*.py")], BYTES_OF_CODE)
    yield from texts(
        [
            (packages, "*.dist-info/METADATA"),
            (packages, "*.dist-info/**/LICENSE*"),
            (share, "common-licenses/*"),
            (share, "perl/*/pod/*.pod"),
            (share, "doc/*/*"),
            (packages, "**/*.md"),
            (packages, "**/*.rst"),
            (packages, "**/*.txt"),
        ],
        BYTES_OF_ENGLISH,
    )


def main(path: str = "tokenizer.json") -> None:
    """Train on this machine's texts and write the tokenizer next to this file (or to `path`)."""
    tokenizer = empty_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE, tokenizer.get_vocab_size()
    tokenizer.save(str(Path(__file__).parent / path))


if __name__ == "__main__":
    main(*sys.argv[1:])
