"""Owns the parameters that requests have in their slots on the devices; runs the programs of `full_sampler`."""

from typing import Any

import jax

from jaxinfer.batch import StepBatch, StepShape
from jaxinfer.compilations import Compiling, compile_program
from jaxinfer.extras import Extras
from jaxinfer.sampler_lowerings import LOAD, SCORE, Key, SamplerLowerings, without_tokens
from jaxinfer.steps import Activations, Arrays, SlotState, StepOutput


def needed(shape: StepShape, extras: Extras | None) -> list[Key]:
    """Keys of the programs that a step with these extras runs behind its own."""
    if extras is None:
        return []
    num_drawn = shape.rows + shape.chunks
    uses = ((LOAD, bool(extras.loads)), (num_drawn, extras.rows is not None), (SCORE, extras.score is not None))
    return [key for key, is_used in uses if is_used]


class SamplerPrograms:
    """Does the extras of steps over slot parameters that it holds."""

    def __init__(self, lowerings: SamplerLowerings):
        self._allocate = compile_program(lowerings.allocation())
        self._params = self._allocate()

    def run(
        self,
        programs: Compiling[Any],
        slots: SlotState,
        weights: Arrays,
        activations: Activations,
        output: StepOutput,
        batch: StepBatch,
        extras: Extras,
    ) -> tuple[SlotState, StepOutput]:
        """Does a step's extras behind it; donates `slots`. The batch's and the extras' arrays are on the devices.

        `programs` has those of `SamplerLowerings.all`, by their keys.
        """
        for load in extras.loads:
            self._params = programs[LOAD](self._params, load)
        if extras.rows is not None:
            batch = without_tokens(batch)
            sample = programs[batch.slots.shape[1]]
            expert_counts, output = output.expert_counts, output._replace(expert_counts=None)
            slots, self._params, output = sample(slots, self._params, activations.logits, output, batch, extras.rows)
            output = output._replace(expert_counts=expert_counts)
        if extras.score is not None:
            scores = programs[SCORE](weights, activations.hidden, extras.score)
            output = output._replace(prompt_logprobs=scores)
        return slots, output

    def reset(self) -> None:
        """Makes new parameters after a step that failed, and may have taken the donated ones with it."""
        self.close()
        self._params = self._allocate()

    def close(self) -> None:
        """Frees the device memory."""
        for array in jax.tree.leaves(self._params):
            array.delete()
