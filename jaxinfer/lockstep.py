"""Every process runs the steps that process 0 decides on: it announces each as it starts it, and the others follow.

What travels is what a step is given, small arrays on the host, never what it computes. So a follower, which holds its
part of weights and cache and has the same programs, needs no scheduler.
"""

import contextlib
import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxinfer import frames
from jaxinfer.batch import ChunkArrays, StepBatch, StepShape
from jaxinfer.extras import Extras, FullRows, Score, SlotLoad, SlotParams
from jaxinfer.frames import Frame, Kind
from jaxinfer.logits_processors import ProcessorArrays
from jaxinfer.process_group import ProcessGroup
from jaxinfer.runner import Runner
from jaxinfer.sampling import SamplingArrays
from jaxinfer.steps import StepOutput

_GRACE_S = 1.0


class LeadingRunner(Runner):
    """A Runner of process 0: what it does, the runners of the others do in the same order.

    It works in a thread of its own, where no KeyboardInterrupt can part an announcement from what it announces.
    """

    def __init__(self, *args: Any, group: ProcessGroup, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._group = group
        self._thread = ThreadPoolExecutor(1)
        self._last_output: StepOutput | None = None

    def dispatch(self, shape: StepShape, batch: StepBatch, extras: Extras | None = None) -> StepOutput:
        """As `Runner.dispatch`. Ends the job if it cannot start what the others start."""

        def start() -> StepOutput:
            self.check_compiled(shape, extras)
            self._group.announce(encode_step(shape, batch, extras))
            try:
                self._last_output = super(LeadingRunner, self).dispatch(shape, batch, extras)
            except Exception as error:
                self._group.die(f"could not start a step: {error!r}", unless_told_s=_GRACE_S)
            return self._last_output

        return self._thread.submit(start).result()

    def reset_cache(self) -> None:
        """As `Runner.reset_cache`. Ends the job if a process hangs in the step that failed."""

        def reset() -> None:
            self._group.announce(frames.encode(Kind.RESET_CACHE))
            # The others answer once their steps are done, and one may take longer than the limit for their answer. Its
            # output is gathered from all of them: when it is here they are done as well, or else it failed.
            with contextlib.suppress(Exception):
                jax.block_until_ready(self._last_output)
            super(LeadingRunner, self).reset_cache()
            self._group.all_gather("reset", None, timeout_s=self._group.timeout_s)

        self._thread.submit(reset).result()

    def close(self) -> None:
        """As `Runner.close`; the others stop following."""
        self._thread.submit(super().close).result()
        self._thread.shutdown()
        self._last_output = None
        self._group.close()


def runner_type(group: ProcessGroup | None) -> Callable[..., Runner]:
    """What makes the runner of this process."""
    return functools.partial(LeadingRunner, group=group) if group is not None and group.leads else Runner


def follow(runner: Runner, group: ProcessGroup) -> None:
    """Runs what process 0 announces until it closes its engine. Ends the job if a step fails."""
    under_way: queue.SimpleQueue[StepOutput | threading.Event | None] = queue.SimpleQueue()
    threading.Thread(target=_watch, args=(under_way, group), daemon=True).start()
    while (frame := group.next_announcement()).kind is not Kind.CLOSE:
        try:
            if frame.kind is Kind.STEP:
                under_way.put(runner.dispatch(*decode_step(frame)))
            elif frame.kind is Kind.RESET_CACHE:
                under_way.put(all_done := threading.Event())
                all_done.wait()
                runner.reset_cache()
                group.all_gather("reset", None)
            else:
                raise ValueError(f"{frame.kind.name} is nothing to follow")
        except Exception as error:
            group.die(f"could not follow: {error!r}", unless_told_s=_GRACE_S)
    under_way.put(None)


def _watch(under_way: queue.SimpleQueue[StepOutput | threading.Event | None], group: ProcessGroup) -> None:
    """Waits for each step, for nobody else does: one that fails here may let the others wait for ever."""
    while (item := under_way.get()) is not None:
        if isinstance(item, threading.Event):
            item.set()
            continue
        try:
            jax.block_until_ready(item)
        except Exception as error:
            group.die(f"a step failed: {error!r}", unless_told_s=_GRACE_S)


def encode_step(shape: StepShape, batch: StepBatch, extras: Extras | None) -> bytes:
    """A step as a frame."""
    about = None if extras is None else [len(extras.loads), extras.rows is not None, extras.score is not None]
    arrays = [np.asarray(array) for array in jax.tree.leaves((batch, extras))]
    return frames.encode(Kind.STEP, {"shape": shape, "extras": about}, arrays)


def decode_step(frame: Frame) -> tuple[StepShape, StepBatch, Extras | None]:
    """What `encode_step` was given. Raises ValueError for anything else."""
    shape, about = StepShape(*frame.value["shape"]), frame.value["extras"]
    structure = jax.tree.structure((_batch_like(shape), None if about is None else _extras_like(*about)))
    if structure.num_leaves != len(frame.arrays):
        raise ValueError(f"a step with {len(frame.arrays)} arrays in place of {structure.num_leaves}")
    return shape, *jax.tree.unflatten(structure, frame.arrays)


def _batch_like(shape: StepShape) -> StepBatch:
    """Of the same structure as the batch of a step; what its leaves are means nothing."""
    batch = _filled(StepBatch)
    return batch._replace(sampling=_filled(SamplingArrays), chunks=_filled(ChunkArrays) if shape.chunks else None)


def _extras_like(num_loads: int, has_rows: bool, has_score: bool) -> Extras:
    params = _filled(SlotParams)._replace(processors=_filled(ProcessorArrays))
    loads = (_filled(SlotLoad)._replace(params=params),) * num_loads
    return Extras(loads, _filled(FullRows) if has_rows else None, _filled(Score) if has_score else None)


def _filled(kind: Callable[..., Any]) -> Any:
    """A named tuple of this kind, of zeros."""
    return kind(*[0] * len(kind._fields))  # pyright: ignore[reportFunctionMemberAccess]
