"""A model as a function of a flat tuple of arrays.

Flax NNX defines models: names, axes, initialisation. The hot path is plain `jax.jit` over one flat tuple,
because traversing the module costs a hundred times more host time per step.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer import models
from jaxinfer.config import EncoderConfig, ModelConfig
from jaxinfer.layouts import check_mesh
from jaxinfer.param_specs import ParamSpec, WeightSpec, param_specs, weight_specs
from jaxinfer.partitioning import Partitioner
from jaxinfer.planning.weight_shapes import ModelWeights, WeightShape
from jaxinfer.stages import StagePlan, num_microbatches
from sharding_rules import axes as ax


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """The model's structure, without its arrays.

    Attributes:
      config: the model's numbers.
      family: the module under `jaxinfer/models/`.
      partitioner: mesh and rules.
      params: one spec per parameter, each on the devices of its pipeline stage.
      weights: what programs take, in the order of their flat tuple: without stages the same.
    """

    config: ModelConfig | EncoderConfig
    family: types.ModuleType
    partitioner: Partitioner
    params: tuple[ParamSpec, ...]
    weights: tuple[WeightSpec, ...]
    _graph: nnx.GraphDef
    _treedef: jax.tree_util.PyTreeDef

    @classmethod
    def create(
        cls, config: ModelConfig | EncoderConfig, partitioner: Partitioner, dtype: jnp.dtype
    ) -> "ModelDefinition":
        """Allocates nothing. Raises ValueError for a mesh, or a parameter, that it cannot split the model over."""
        check_mesh(config, partitioner)
        partitioner = partitioner.fitted(ax.VOCAB, config.vocab_size)  # 50,257 of GPT-2 is whole on every device
        family, plan = models.get(config.family), StagePlan.create(config.num_layers, partitioner.axis_size(ax.STAGE))

        def split(partitioner: Partitioner) -> tuple[nnx.GraphDef, nnx.State]:
            def make() -> nnx.Module:
                key = jax.random.key(0)  # for all: with the keys of nnx.Rngs the time grows as the square of the layers
                rngs = types.SimpleNamespace(params=lambda: key)
                return family.Model(config, partitioner, dtype=jnp.dtype(dtype), rngs=rngs)

            return nnx.split(nnx.eval_shape(make), nnx.Param)

        graph, state = split(partitioner)
        whole = state if plan.num_stages == 1 else split(partitioner.of_stage(0))[1]  # with all layers
        params = param_specs(whole, partitioner, plan)
        weights = tuple(weight_specs(state, params, partitioner, plan))
        return cls(config, family, partitioner, params, weights, graph, jax.tree.structure(state))

    @property
    def settings(self) -> str:
        """Equal for definitions whose functions are the same."""
        return repr((self.config, self.dtype.name, self.partitioner.settings))

    @property
    def decoder_config(self) -> ModelConfig:
        """`config`, of a decoder."""
        assert isinstance(self.config, ModelConfig)
        return self.config

    def bind(self, arrays: tuple[jax.Array, ...]) -> models.Decoder:
        """The family's `Model` over what programs take, on a stage without the stages' axis. For use inside jit."""
        return self._merge(arrays)

    def bind_encoder(self, arrays: tuple[jax.Array, ...]) -> models.Encoder:
        """As `bind`, of an encoder's family."""
        return self._merge(arrays)

    def init(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """Random parameters, created already sharded: the same model on every mesh."""

        def make(chosen: list[int]) -> list[jax.Array]:
            config = _as_stored(self.config)
            model = self.family.Model(config, Partitioner.create(), dtype=self.dtype, rngs=nnx.Rngs(seed))
            whole = jax.tree.leaves(nnx.state(model, nnx.Param))
            return [self.params[i].repeat(whole[i]) for i in chosen]

        by_mesh: dict[Any, list[int]] = {}
        for i, spec in enumerate(self.params):
            by_mesh.setdefault(spec.sharding.mesh, []).append(i)
        arrays: dict[int, jax.Array] = {}
        for chosen in by_mesh.values():
            shardings = [self.params[i].sharding for i in chosen]
            arrays |= zip(chosen, jax.jit(lambda chosen=chosen: make(chosen), out_shardings=shardings)(), strict=True)
        return tuple(arrays[i] for i in range(len(self.params)))

    def stack(self, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """What programs take, of the parameters. Takes the memory of `arrays` over: they are gone then."""
        if self.partitioner.axis_size(ax.STAGE) == 1:
            return arrays
        return tuple(weight.stack(arrays) for weight in self.weights)

    def _merge(self, arrays: tuple[jax.Array, ...]) -> Any:
        return nnx.merge(self._graph, jax.tree.unflatten(self._treedef, arrays))

    @property
    def abstract_arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of what programs take, to compile with."""
        return tuple(jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding) for w in self.weights)

    @property
    def dtype(self) -> jnp.dtype:
        """Of every parameter but the few that are never rounded."""
        return self.params[0].dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters as the mesh has them: with every repetition of KV heads, every copy of experts."""
        return sum(spec.num_bytes for spec in self.params)

    @property
    def shard_bytes(self) -> int:
        """Bytes of the weights on one device."""
        return sum(weight.shard_bytes for weight in self.weights)

    @property
    def step_shard_bytes(self) -> int:
        """Bytes of weights that a decode step has to read on one device at least, of the stage that reads the most.

        A stage reads its layers, and every device its part of the head, once for each microbatch.
        """
        num_stages = self.partitioner.axis_size(ax.STAGE)
        of_stages = [
            sum(int(weight.shard_bytes * weight.read_share) for weight in self.weights if weight.is_on(stage))
            for stage in range(num_stages)
        ]
        return num_microbatches(num_stages, 0, self.partitioner.platform) * max(of_stages)


@functools.lru_cache(maxsize=8)
def model_weights(config: ModelConfig, dtype: jnp.dtype) -> ModelWeights:
    """What each mesh would have of a decoder, for arithmetic: from its first layers, up to one of each kind."""
    like = _layers_alike(config)
    first = dataclasses.replace(config, num_layers=max(like) + 1, windows=config.windows[: max(like) + 1])
    definition = ModelDefinition.create(first, Partitioner.abstract(""), dtype)
    shapes = (WeightShape(w.path, w.shape, w.axes, w.dtype.itemsize, w.read_share) for w in definition.weights)
    return ModelWeights.create(config, shapes, like)


def _layers_alike(config: ModelConfig) -> tuple[int, ...]:
    """For each layer the first whose parameters have the same shapes."""
    if config.moe is not None and config.moe.placements:  # layers may have different numbers of copies
        return tuple(range(config.num_layers))
    has_experts = [config.has_experts(layer) for layer in range(config.num_layers)]
    return tuple(map(has_experts.index, has_experts))


def _as_stored(config: ModelConfig | EncoderConfig) -> ModelConfig | EncoderConfig:
    """With each expert once."""
    if isinstance(config, EncoderConfig) or config.moe is None:
        return config
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, placements=()))
