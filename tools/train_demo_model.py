"""Trains the demonstration model that ships inside the package.

    python tools/train_demo_model.py --text=fairy_tales.txt --output=demo --work_dir=/tmp/demo_training

Makes a byte-level BPE tokenizer, trains the project's own Flax Llama, and writes an ordinary Hugging Face
directory with a model card. Every twentieth story is held out for the perplexity in the card.

Hidden matrices are trained with Muon, the rest with AdamW (optax), at a constant rate that falls linearly to
zero over the last part. Most of the training sees short windows, because attention is what a CPU waits for;
the last part sees windows as long as the context. `--work_dir` keeps the states of the way, so that a stopped
run goes on; to train a finished one for longer, delete the states of its last part and raise `--steps`.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tokenizers
from absl import app, flags
from optax.contrib import MuonDimensionNumbers, muon
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxinfer.attention import causal_attention
from jaxinfer.checkpoint.hf_writer import write_model
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from sharding_rules import axes as ax
from tools import demo_model_card

_TEXT = flags.DEFINE_string("text", None, "Training text: a paragraph per line, titles in capitals.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Model directory to write.", required=True)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Where training state is kept.", required=True)
_STEPS = flags.DEFINE_integer("steps", 2000, "Optimizer steps in all.", lower_bound=1)
_DECAY_STEPS = flags.DEFINE_integer("decay_steps", 500, "Last steps, in which the learning rate falls to zero.")
_LONG_STEPS = flags.DEFINE_integer("long_steps", 250, "Last steps, which see windows as long as the context.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 4096, "Tokens per step.", lower_bound=512)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 4e-3, "Peak learning rate.")
_SAVE_EVERY = flags.DEFINE_integer("save_every", 100, "Steps between saves of the training state.")

END = "<|endoftext|>"
HELD_OUT_EVERY = 20  # stories: 5 %
SHORT_WINDOW = 128
WEIGHT_DECAY = 0.1
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
    "dtype": "bfloat16",
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


def windows(ids: np.ndarray, length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random windows of `length` + 1 tokens, int32 [count, length + 1]."""
    starts = rng.integers(0, len(ids) - length - 1, count)
    return ids[starts[:, None] + np.arange(length + 1)]


def token_losses(definition: ModelDefinition, arrays: tuple[jax.Array, ...], batch: jax.Array) -> jax.Array:
    """Cross-entropy in nats of each next token: int32 [B, T + 1] -> float32 [B, T]."""
    model, scale = definition.bind(arrays), definition.config.softmax_scale
    tokens, targets = batch[:, :-1], batch[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model(tokens, positions, lambda layer, q, k, v: causal_attention(q, k, v, scale))
    return optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets)


def make_optimizer(definition: ModelDefinition) -> optax.GradientTransformation:
    """Muon for hidden matrices, AdamW for embeddings and norms; warm-up, constant, linear to zero."""
    warmup, total, decay = 50, _STEPS.value, _DECAY_STEPS.value
    rate = _LEARNING_RATE.value
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, rate, warmup),
            optax.constant_schedule(rate),
            optax.linear_schedule(rate, 0.02 * rate, decay),
        ],
        [warmup, total - decay],
    )

    def matrix_axes(axes: ax.LogicalAxes) -> MuonDimensionNumbers | None:
        if len(axes) < 2 or ax.VOCAB in axes:
            return None
        embed, others = axes.index(ax.EMBED), tuple(i for i, axis in enumerate(axes) if axis != ax.EMBED)
        reduction, output = (others, embed) if embed == 0 else (embed, others)
        return MuonDimensionNumbers(reduction, output)

    optimizer = muon(
        schedule,
        weight_decay=WEIGHT_DECAY,
        adam_b2=0.98,
        adam_weight_decay=0.01,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=tuple(matrix_axes(spec.axes) for spec in definition.params),  # pyright: ignore
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


@dataclasses.dataclass
class Trainer:
    """Training state and the compiled steps over it."""

    definition: ModelDefinition
    train_ids: np.ndarray
    held_out_ids: np.ndarray

    def __post_init__(self):
        self.optimizer = make_optimizer(self.definition)
        self.params = self.definition.init(seed=0)
        self.opt_state = jax.jit(self.optimizer.init)(self.params)
        self.step = 0

    @functools.cached_property
    def _update(self):
        def update(params, opt_state, batch):
            loss, grads = jax.value_and_grad(lambda p: token_losses(self.definition, p, batch).mean())(params)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        return jax.jit(update, donate_argnums=(0, 1))

    def train_step(self) -> jax.Array:
        """One step on windows drawn from the step's own seed; the loss in nats per token."""
        context = self.definition.config.max_position
        length = SHORT_WINDOW if self.step < _STEPS.value - _LONG_STEPS.value else context
        rng = np.random.default_rng(self.step)
        batch = windows(self.train_ids, length, _BATCH_TOKENS.value // length, rng)
        self.params, self.opt_state, loss = self._update(self.params, self.opt_state, batch)
        self.step += 1
        return loss

    def held_out_loss(self, max_windows: int | None = None) -> float:
        """Mean nats per held-out token, in disjoint windows of the whole context."""
        length = self.definition.config.max_position
        count = (len(self.held_out_ids) - 1) // length
        count = min(count, max_windows or count)
        losses = jax.jit(functools.partial(token_losses, self.definition))
        total = 0.0
        for i in range(count):
            batch = self.held_out_ids[i * length : (i + 1) * length + 1][None]
            total += float(losses(self.params, batch).mean())
        return total / count

    def save(self, directory: pathlib.Path) -> None:
        state = {"params": self.params, "opt_state": self.opt_state}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((directory / f"step_{self.step}").absolute(), state, force=True)

    def restore(self, directory: pathlib.Path) -> None:
        """Goes on from the newest state in `directory`, if there is one."""
        steps = [int(path.name[5:]) for path in directory.glob("step_*") if path.name[5:].isdigit()]
        if not steps:
            return
        state = {"params": self.params, "opt_state": self.opt_state}
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore((directory / f"step_{max(steps)}").absolute(), state)
        self.params, self.opt_state, self.step = state["params"], state["opt_state"], max(steps)


def export(trainer: Trainer, tokenizer: tokenizers.Tokenizer, output: pathlib.Path) -> None:
    """The model as a Hugging Face directory, weights in bfloat16."""
    arrays = tuple(array.astype(jnp.bfloat16) for array in trainer.params)
    write_model(output, HF_CONFIG, trainer.definition, arrays)
    tokenizer.save(str(output / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    for name, values in (("tokenizer_config.json", settings), ("generation_config.json", GENERATION_CONFIG)):
        (output / name).write_text(json.dumps(values, indent=2) + "\n")


def train_to_end(trainer: Trainer, work_dir: pathlib.Path) -> None:
    """Trains up to `--steps`, printing the loss and saving the state on the way."""
    start, start_step = time.perf_counter(), trainer.step
    while trainer.step < _STEPS.value:
        loss = trainer.train_step()
        if trainer.step % 20 == 0:
            loss = float(loss)
            rate = (trainer.step - start_step) * _BATCH_TOKENS.value / (time.perf_counter() - start)
            print(f"step {trainer.step} of {_STEPS.value}: loss {loss:.3f}, {rate:.0f} tokens/s", flush=True)
        if trainer.step % _SAVE_EVERY.value == 0 or trainer.step == _STEPS.value:
            print(f"step {trainer.step}: held-out loss {trainer.held_out_loss(16):.3f}", flush=True)
            trainer.save(work_dir)


def main(argv: list[str]) -> None:
    del argv
    work_dir, output = pathlib.Path(_WORK_DIR.value), pathlib.Path(_OUTPUT.value)
    stories = split_stories(pathlib.Path(_TEXT.value).read_text())
    held_out = stories[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [story for i, story in enumerate(stories) if (i + 1) % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(train)
    train_ids, held_out_ids = (encode(tokenizer, part) for part in (train, held_out))
    config = llama.parse_config(HFConfig(HF_CONFIG))
    trainer = Trainer(ModelDefinition.create(config, Partitioner.create(), jnp.float32), train_ids, held_out_ids)
    trainer.restore(work_dir)
    num_params = sum(math.prod(spec.shape) for spec in trainer.definition.params)
    print(
        f"{num_params} parameters; {len(train_ids)} training tokens, {len(held_out_ids)} held out; step {trainer.step}"
    )
    train_to_end(trainer, work_dir)
    export(trainer, tokenizer, output)
    facts = {
        "num_params": num_params,
        "steps": trainer.step,
        "epochs": trainer.step * _BATCH_TOKENS.value / len(train_ids),
        "train_tokens": len(train_ids),
        "held_out_tokens": len(held_out_ids),
        "perplexity": math.exp(trainer.held_out_loss()),
    }
    (output / "README.md").write_text(demo_model_card.render(facts, demo_model_card.samples(output)))
    print(json.dumps(facts))


if __name__ == "__main__":
    app.run(main)
