"""The training loop of the demonstration model: optimizer, steps, held-out loss and the states that are kept."""

import dataclasses
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from optax.contrib import MuonDimensionNumbers, muon

from jaxinfer.attention import causal_attention
from jaxinfer.parameters import ModelDefinition
from sharding_rules import axes as ax

WARMUP_STEPS = 50
SHORT_WINDOW = 128  # tokens
WEIGHT_DECAY = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one chooses about a training run.

    Attributes:
      steps: of the optimizer, in all.
      decay_steps: the last of them, in which the learning rate falls to a fiftieth.
      long_steps: the last of them, which see windows as long as the context.
      batch_tokens: per step.
      learning_rate: at its peak.
      save_every: steps between saves of the training state.
    """

    steps: int
    decay_steps: int
    long_steps: int
    batch_tokens: int
    learning_rate: float
    save_every: int


def windows(ids: np.ndarray, length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random windows of `length` + 1 tokens, int32 [count, length + 1]."""
    starts = rng.integers(0, len(ids) - length - 1, count)
    return ids[starts[:, None] + np.arange(length + 1)]


def token_losses(definition: ModelDefinition, arrays: tuple[jax.Array, ...], batch: jax.Array) -> jax.Array:
    """Cross-entropy in nats of each next token: int32 [B, T + 1] -> float32 [B, T]."""
    model, scale = definition.bind(arrays), definition.config.softmax_scale
    tokens, targets = batch[:, :-1], batch[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def attend(slot: int, q: jax.Array, k: jax.Array, v: jax.Array | None, *, sinks: jax.Array | None = None):
        assert v is not None and sinks is None, f"layer {slot} is not a Llama's"
        return causal_attention(q, k, v, scale)

    hidden = model(tokens, positions, attend)
    return optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets)


def make_schedule(recipe: Recipe) -> optax.Schedule:
    """Warm-up, constant, linear to a fiftieth; the recipe must have steps for all three."""
    rate = recipe.learning_rate
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, rate, WARMUP_STEPS),
            optax.constant_schedule(rate),
            optax.linear_schedule(rate, 0.02 * rate, recipe.decay_steps),
        ],
        [WARMUP_STEPS, recipe.steps - recipe.decay_steps],
    )


def make_optimizer(definition: ModelDefinition, recipe: Recipe) -> optax.GradientTransformation:
    """Muon for hidden matrices, AdamW for embeddings and norms."""

    def matrix_axes(axes: ax.LogicalAxes) -> MuonDimensionNumbers | None:
        if len(axes) < 2 or ax.VOCAB in axes:
            return None
        embed, others = axes.index(ax.EMBED), tuple(i for i, axis in enumerate(axes) if axis != ax.EMBED)
        reduction, output = (others, embed) if embed == 0 else (embed, others)
        return MuonDimensionNumbers(reduction, output)

    optimizer = muon(
        make_schedule(recipe),
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
    recipe: Recipe
    train_ids: np.ndarray
    held_out_ids: np.ndarray

    def __post_init__(self):
        self.optimizer = make_optimizer(self.definition, self.recipe)
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
        length = SHORT_WINDOW if self.step < self.recipe.steps - self.recipe.long_steps else context
        rng = np.random.default_rng(self.step)
        batch = windows(self.train_ids, length, self.recipe.batch_tokens // length, rng)
        self.params, self.opt_state, loss = self._update(self.params, self.opt_state, batch)
        self.step += 1
        return loss

    def held_out_loss(self, max_windows: int | None = None, dtype: str = "float32") -> float:
        """Mean nats per held-out token, in disjoint windows of the whole context; of the weights rounded to `dtype`."""
        params = tuple(array.astype(dtype).astype(array.dtype) for array in self.params)
        length = self.definition.config.max_position
        count = (len(self.held_out_ids) - 1) // length
        count = min(count, max_windows or count)
        losses = jax.jit(functools.partial(token_losses, self.definition))
        total = 0.0
        for i in range(count):
            batch = self.held_out_ids[i * length : (i + 1) * length + 1][None]
            total += float(losses(params, batch).mean())
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


def train_to_end(trainer: Trainer, work_dir: pathlib.Path) -> None:
    """Trains up to the recipe's steps, printing the loss and saving the state on the way."""
    recipe = trainer.recipe
    start, start_step = time.perf_counter(), trainer.step
    while trainer.step < recipe.steps:
        loss = trainer.train_step()
        if trainer.step % 20 == 0:
            loss = float(loss)
            rate = (trainer.step - start_step) * recipe.batch_tokens / (time.perf_counter() - start)
            print(f"step {trainer.step} of {recipe.steps}: loss {loss:.3f}, {rate:.0f} tokens/s", flush=True)
        if trainer.step % recipe.save_every == 0 or trainer.step == recipe.steps:
            print(f"step {trainer.step}: held-out loss {trainer.held_out_loss(16):.3f}", flush=True)
            trainer.save(work_dir)
