"""The steps of candidates as XLA compiles them, beside what was planned."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from jaxinfer.batch import StepShape
from jaxinfer.planner import format_bytes
from jaxinfer.planning import target
from jaxinfer.planning.candidates import Candidate, Planner
from jaxinfer.planning.compiled import CompiledStep, compile_step, sampler_bytes
from jaxinfer.planning.hardware import GPUS
from jaxinfer.planning.loads import Load
from jaxinfer.planning.programs import devices_of, planned_programs, widest_shapes
from jaxinfer.step_programs import StepPrograms
from sharding_rules import axes as ax

_MOST_COLLECTIVES = 6  # that are told one by one, the largest
_MOST_AT_ONCE = 8  # programs that are compiled side by side, which takes memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFacts:
    """Of one program on one device.

    Attributes:
      name: what the step does.
      planned_argument_bytes, planned_flops: what the plan has for it.
    """

    name: str
    step: CompiledStep
    planned_argument_bytes: int
    planned_flops: float

    @property
    def excess_bytes(self) -> int:
        """By which arguments are more than planned."""
        return self.step.argument_bytes - self.planned_argument_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateFacts:
    """Of one candidate.

    Attributes:
      steps: the largest that decodes, and the largest that prefills beside it.
      sampler_bytes: of the program that draws with all options from as many logits as the latter has, cut over as many
        devices; None if not compiled.
    """

    candidate: Candidate
    steps: tuple[StepFacts, ...]
    sampler_bytes: int | None

    @property
    def temporary_bytes(self) -> int:
        """The most of any program."""
        return max(self.sampler_bytes or 0, *(fact.step.temporary_bytes for fact in self.steps))

    @property
    def planned_temporary_bytes(self) -> int:
        return self.candidate.plan.memory.temporary_bytes


def devices_for(planner: Planner) -> str:
    """What steps are compiled for, in words."""
    if planner.cluster.name in GPUS and (reason := target.missing()):
        return (
            f"virtual CPU devices, whose temporaries are only near those of a {planner.cluster.device_kind}: {reason}"
        )
    return planner.cluster.device_kind


def compile_candidates(
    planner: Planner, candidates: Sequence[Candidate], *, all_samplers: bool = False
) -> Iterator[CandidateFacts]:
    """In their order. Of a few of the layers, several programs at once.

    What draws is compiled for the first only; if `all_samplers`, for each that it is given other shards of logits on.
    """
    pool = ThreadPoolExecutor(min(_MOST_AT_ONCE, os.cpu_count() or 1))
    try:
        steps, samplers = [], {}
        for candidate in candidates:
            devices = devices_of(planner.cluster, candidate.num_devices)
            programs, counts = planned_programs(planner, candidate, devices)
            shape, splits = widest_shapes(candidate.plan.buckets)["prefill"], candidate.model.splits
            logits = shape.rows + shape.chunks, splits.num_shards(ax.VOCAB)
            if logits not in samplers and (all_samplers or not samplers):
                samplers[logits] = pool.submit(sampler_bytes, programs, shape)
            steps.append((_submit(pool, candidate, programs, counts), samplers.get(logits)))
        for candidate, (of_steps, of_sampler) in zip(candidates, steps, strict=True):
            facts = tuple(step.result() for step in of_steps)
            sampler = of_sampler.result() if of_sampler is not None else None
            yield CandidateFacts(candidate=candidate, steps=facts, sampler_bytes=sampler)
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(
    pool: ThreadPoolExecutor, candidate: Candidate, programs: StepPrograms, counts: Sequence[int]
) -> list[Future[StepFacts]]:

    def step(name: str, shape: StepShape) -> StepFacts:
        return StepFacts(
            name=name,
            step=compile_step(programs, shape, counts),
            planned_argument_bytes=candidate.plan.argument_bytes(shape),
            planned_flops=candidate.model.turn_flops(Load(shape.rows, 0, shape.chunk_tokens, num_chunks=shape.chunks)),
        )

    return [pool.submit(step, name, shape) for name, shape in widest_shapes(candidate.plan.buckets).items()]


def text(facts: CandidateFacts, num_layers: int) -> str:
    """Lines for each step; `num_layers` are those of the whole model."""
    lines = [f"{facts.candidate.mesh}, {facts.steps[0].step.num_layers} of {num_layers} layers compiled:"]
    for fact in facts.steps:
        step = fact.step
        lines.append(
            f"  {fact.name}: {format_bytes(step.argument_bytes)} of arguments ({fact.excess_bytes:+d} bytes), of them "
            f"{format_bytes(step.alias_bytes)} in place; {format_bytes(step.temporary_bytes)} of temporaries"
        )
        if step.product_flops is not None:
            ratio = step.product_flops / fact.planned_flops - 1
            lines.append(f"    {step.product_flops / 1e12:.3f} TFLOP of products in a turn ({ratio:+.1%})")
        lines += _travelling(step)
    taken, planned = facts.temporary_bytes, facts.planned_temporary_bytes
    if facts.sampler_bytes is None:
        lines.append(
            f"  temporaries planned: {format_bytes(planned)}, for sampling with all options, which is not compiled"
        )
    else:
        lines.append(
            f"  sampling with all options: {format_bytes(facts.sampler_bytes)} of temporaries; the most is "
            f"{format_bytes(taken)}, planned {format_bytes(planned)} ({planned / taken - 1:+.1%})"
        )
    return "\n".join(lines)


def _travelling(step: CompiledStep) -> Iterator[str]:
    for travels in step.collectives[:_MOST_COLLECTIVES]:
        where = f"over {','.join(travels.mesh_axes)}"
        counts = [f"{travels.in_layers} in layers"] * bool(travels.in_layers)
        counts += [f"{travels.outside} beside them"] * bool(travels.outside)
        size = f"{travels.dtype} of {format_bytes(travels.num_bytes)}"
        yield f"    {travels.op} {size} {where}: {' and '.join(counts)}"
    if smaller := step.collectives[_MOST_COLLECTIVES:]:
        num_smaller = sum(travels.in_layers + travels.outside for travels in smaller)
        yield f"    {num_smaller} more, of at most {format_bytes(smaller[0].num_bytes)}"
