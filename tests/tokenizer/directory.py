"""Directories of small tokenizers, of the kinds that models have."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

END = "<end>"
TEXTS = [
    "Once upon a time, there was a girl . She said: don't!",
    "naïve café, e\u0301 decomposed, \u0915\u094d\u0937\u093f, मनीष",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇵🇱 done",
    "汉字かな한글 mixed\n\n\tspaces   ",
    "\ufffd is a character too",
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def save(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path, **settings: object) -> pathlib.Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2 and Llama 3: tokens are pieces of UTF-8, so a character may take four of them."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:2], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2: a space becomes a mark, the first one is stripped, and unknown characters become byte tokens."""
    words = ["<unk>", END, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Oncehratimdupsg,.:'!"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens([END])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
