"""Owns what is on the devices: weights, cache, each slot's last token, and one compiled program per shape.

A step decodes rows, or prefills chunks of prompts beside them; it takes cache and slots and gives
them back. All programs are those of `start_compiling`; a shape outside that list is an error, never a silent
compilation.
"""

from collections.abc import Callable

import jax
import numpy as np

from jaxinfer import kv_cache
from jaxinfer.batch import Buckets, StepBatch, StepShape
from jaxinfer.compilations import Compiling
from jaxinfer.extras import Extras
from jaxinfer.kv_cache import CacheSpec
from jaxinfer.parameters import ModelDefinition
from jaxinfer.programs import Program
from jaxinfer.sampler_lowerings import Key
from jaxinfer.sampler_programs import SamplerPrograms, needed
from jaxinfer.step_programs import StepPrograms
from jaxinfer.steps import Arrays, SlotState, StepOutput


class Runner:
    """Runs steps over weights, cache and slots that it holds.

    Attributes:
      definition: the model.
      buckets: every shape of a step.
      extras_spec: the sizes of what a step may be given beyond its batch.
    """

    def __init__(
        self,
        definition: ModelDefinition,
        weights: Arrays,
        spec: CacheSpec,
        buckets: Buckets,
        *,
        backend: str,
        counts_experts: bool = False,
    ):
        self.definition = definition
        self.buckets = buckets
        self._partitioner = definition.partitioner
        self._steps = StepPrograms(
            definition=definition, cache_spec=spec, buckets=buckets, backend=backend, counts_experts=counts_experts
        )
        self._weights = definition.stack(weights)
        self._allocate_cache = kv_cache.allocator(spec, self._partitioner)
        self._cache, self._slots = self._allocate_cache(), self._empty_slots()
        self._programs: Compiling[StepShape | Key] = Compiling({})
        self.extras_spec = self._steps.extras_spec
        self._sampler = SamplerPrograms(self._steps.sampler)

    def compile_all(self, progress: Callable[[int, int], None] | None = None, *, extras: bool = True) -> None:
        """Compiles every program in `buckets`, calling `progress(done, total)` after each.

        Without `extras` no step can have any, and much less is compiled.
        """
        self.start_compiling(extras=extras)
        self.finish_compiling(progress)

    def start_compiling(self, *, extras: bool = True) -> None:
        """Returns at once: a step waits for its own program."""
        shapes = self.buckets.shapes()
        one_token = [self._steps.batch(shape) for shape in shapes if shape.num_steps == 1]
        programs: dict[StepShape | Key, Program] = {shape: self._steps.program(shape) for shape in shapes}
        if extras:
            programs |= self._steps.sampler.all(one_token, self.definition.abstract_arrays)
        self._programs = Compiling(programs)

    @property
    def is_compiling(self) -> bool:
        return not self._programs.is_done

    def finish_compiling(self, progress: Callable[[int, int], None] | None = None) -> float:
        """Waits for what `start_compiling` has started -> seconds that it took."""
        return self._programs.wait(progress)

    def dispatch(self, shape: StepShape, batch: StepBatch, extras: Extras | None = None) -> StepOutput:
        """Starts a step and returns its output, on the devices, without waiting for it."""
        self.check_compiled(shape, extras)
        if extras is not None and extras.rows is not None:  # these draw again, so the step itself need not
            batch = batch._replace(sampling=batch.sampling._replace(draws=np.array(False)))
        batch, extras = self._partitioner.put_rows((batch, extras))
        self._cache, self._slots, output, activations = self._programs[shape](
            self._weights, self._cache, self._slots, batch
        )
        if extras is not None:
            self._slots, output = self._sampler.run(
                self._programs, self._slots, self._weights, activations, output, batch, extras
            )
        for array in jax.tree.leaves(output):
            array.copy_to_host_async()
        return output

    def is_compiled(self, shape: StepShape, extras: Extras | None) -> bool:
        """Whether such a step starts at once; so does one that never can, to say so."""
        return shape not in self._programs or all(map(self._programs.has, [shape, *needed(shape, extras)]))

    def check_compiled(self, shape: StepShape, extras: Extras | None) -> None:
        """Waits until it is; RuntimeError for a shape that never will be."""
        if shape not in self._programs:
            shapes = sorted(key for key in self._programs if isinstance(key, StepShape))
            raise RuntimeError(f"{shape} is not a compiled shape; compiled: {shapes}")
        for key in (shape, *needed(shape, extras)):
            self._programs[key]

    def reset_cache(self) -> None:
        """Makes a new, empty cache after a step that failed, and may have taken the donated one with it."""
        for array in jax.tree.leaves((self._cache, self._slots)):
            array.delete()  # before the new one: there is no room for two
        self._cache, self._slots = self._allocate_cache(), self._empty_slots()
        self._sampler.reset()

    def close(self) -> None:
        """Frees the device memory."""
        for array in jax.tree.leaves((self._weights, self._cache, self._slots)):
            array.delete()
        self._sampler.close()
        self._weights, self._cache = (), ()
        self._programs.close()
        self._programs = Compiling({})

    def _empty_slots(self) -> SlotState:
        shape = self._steps.slot_shape
        empty = SlotState(np.zeros(shape, np.int32), np.zeros(shape, np.bool_))
        return self._partitioner.put_rows(empty)
