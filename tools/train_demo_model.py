"""Trains the demonstration model that ships inside the package.

    python tools/train_demo_model.py --text=fairy_tales.txt --output=demo --work_dir=/tmp/demo_training

Makes a byte-level BPE tokenizer, trains the project's own Flax Llama, and writes an ordinary Hugging Face
directory with a model card. Every twentieth story is held out for the perplexity in the card.

Hidden matrices are trained with Muon, the rest with AdamW (optax), at a constant rate that falls linearly to
a fiftieth over the last part. Most of the training sees short windows, because attention is what a CPU waits for;
the last part sees windows as long as the context. `--work_dir` keeps the states of the way, so that a stopped
run goes on; to train a finished one for longer, delete the states of its last part and raise `--steps`.
"""

import json
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from absl import app, flags
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxinfer.checkpoint.hf_writer import write_files
from jaxinfer.checkpoint.replacement import replaced
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.tools import demo_model_card
from jaxinfer.tools.demo_training import SHORT_WINDOW, WARMUP_STEPS, Recipe, Trainer, train_to_end

_TEXT = flags.DEFINE_string("text", None, "Training text: a paragraph per line, titles in capitals.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Model directory to write.", required=True)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Where training state is kept.", required=True)
_STEPS = flags.DEFINE_integer("steps", 1700, "Optimizer steps in all.", lower_bound=1)
_DECAY_STEPS = flags.DEFINE_integer("decay_steps", 300, "Last steps, in which the rate falls to a fiftieth.", 1)
_LONG_STEPS = flags.DEFINE_integer("long_steps", 120, "Last steps, which see windows as long as the context.", 0)
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 4096, "Tokens per step.", lower_bound=512)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 4e-3, "Peak learning rate.")
_SAVE_EVERY = flags.DEFINE_integer("save_every", 100, "Steps between saves of the training state.", 1)

flags.register_multi_flags_validator(
    ["steps", "decay_steps"],
    lambda values: values["steps"] >= values["decay_steps"] + WARMUP_STEPS,
    f"--steps must be at least --decay_steps + {WARMUP_STEPS}: the learning rate rises before it falls",
)

END = "<|endoftext|>"
HELD_OUT_EVERY = 20  # stories: 5 %
SHIPPED_DTYPE = "bfloat16"
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": SHIPPED_DTYPE,
}
GENERATION_CONFIG = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.95}


def split_stories(text: str) -> list[str]:
    """Stories without their titles: a line in capitals ends one and starts the next."""
    stories: list[list[str]] = [[]]
    for paragraph in filter(None, (line.strip() for line in text.splitlines())):
        if paragraph.isupper() or paragraph.startswith(("By ", "Edited by ", "Translated by ")):
            stories.append([])
        else:
            stories[-1].append(paragraph)
    return ["\n\n".join(story) for story in stories if sum(map(len, story)) > 200]


def train_tokenizer(stories: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE that starts every text with the END token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=HF_CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, stories: list[str]) -> np.ndarray:
    """All stories in a row, each after an END token: int32."""
    return np.concatenate([np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(stories)])


def export(trainer: Trainer, tokenizer: tokenizers.Tokenizer, output: pathlib.Path, facts: dict[str, Any]) -> None:
    """The model as a Hugging Face directory, whole or not at all, with a card that quotes what it writes."""
    arrays = tuple(array.astype(SHIPPED_DTYPE) for array in trainer.params)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    with replaced(output) as partial:
        write_files(partial, HF_CONFIG, trainer.definition, arrays)
        tokenizer.save(str(partial / "tokenizer.json"))
        for name, values in (("tokenizer_config.json", settings), ("generation_config.json", GENERATION_CONFIG)):
            (partial / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        card = demo_model_card.render(facts, demo_model_card.samples(partial))
        (partial / "README.md").write_text(card, encoding="utf-8")


def main(argv: list[str]) -> None:
    del argv
    stories = split_stories(pathlib.Path(_TEXT.value).read_text(encoding="utf-8"))
    held_out = stories[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [story for i, story in enumerate(stories) if (i + 1) % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(train)
    train_ids, held_out_ids = (encode(tokenizer, part) for part in (train, held_out))
    config = llama.parse_config(HFConfig(HF_CONFIG))
    recipe = Recipe(
        steps=_STEPS.value,
        decay_steps=_DECAY_STEPS.value,
        long_steps=_LONG_STEPS.value,
        batch_tokens=_BATCH_TOKENS.value,
        learning_rate=_LEARNING_RATE.value,
        save_every=_SAVE_EVERY.value,
    )
    definition = ModelDefinition.create(config, Partitioner.create(), jnp.dtype("float32"))
    trainer = Trainer(definition, recipe, train_ids, held_out_ids)
    work_dir = pathlib.Path(_WORK_DIR.value)
    trainer.restore(work_dir)
    num_params = sum(math.prod(spec.shape) for spec in definition.params)
    print(
        f"{num_params} parameters; {len(train_ids)} training tokens, {len(held_out_ids)} held out; step {trainer.step}"
    )
    train_to_end(trainer, work_dir)
    facts = {
        "num_params": num_params,
        "vocab_size": config.vocab_size,
        "context": config.max_position,
        "short_window": SHORT_WINDOW,
        "steps": trainer.step,
        "batch_tokens": recipe.batch_tokens,
        "epochs": trainer.step * recipe.batch_tokens / len(train_ids),
        "train_tokens": len(train_ids),
        "held_out_tokens": len(held_out_ids),
        "dtype": SHIPPED_DTYPE,
        "perplexity": math.exp(trainer.held_out_loss(dtype=SHIPPED_DTYPE)),
    }
    export(trainer, tokenizer, pathlib.Path(_OUTPUT.value), facts)
    print(json.dumps(facts))


if __name__ == "__main__":
    app.run(main)
