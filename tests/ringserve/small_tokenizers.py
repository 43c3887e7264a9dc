"""Two small tokenizers as real checkpoints carry them: byte-level BPE (GPT-2, Qwen, Llama 3) and a sentencepiece
one with byte fallback (Llama 2, Mistral, Gemma)."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "<|user|>", "<|assistant|>", "<|end|>"]
CORPUS = ["hello world, the quick brown fox jumps over the lazy dog; the end of the day " * 3,
          "übergrößen größer straße café naïve", "日本語の文章 日本語 中文 한국어", "привет мир",
          "a  b   c\n\nd\te 1234 567"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'tool' -%}{{ raise_exception('no tools here') }}{%- endif -%}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}")


def _save(tokenizer: Tokenizer, directory: Path) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>",
                                   additional_special_tokens=["<|user|>", "<|assistant|>"])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory


def write_byte_level(directory: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False))
    return _save(tokenizer, directory)


def write_sentencepiece(directory: Path) -> Path:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>", byte_fallback=True,
        merges=[tuple(merge) for merge in model["merges"]], fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return _save(tokenizer, directory)


WRITERS = {"byte-level": write_byte_level, "sentencepiece": write_sentencepiece}
