"""A step comes out of its frame as it went in, whatever it carries."""

import jax
import numpy as np
import pytest

from jaxinfer import batch, extras, frames, lockstep
from jaxinfer.batch import Buckets, StepBatch, StepShape
from jaxinfer.extras import Extras, ExtrasSpec, FullRows, Score
from jaxinfer.frames import Frame, Kind
from jaxinfer.step_plan import StepPlan
from tests.test_frames import reader

BUCKETS = Buckets.create(
    max_rows=4, max_model_len=64, max_chunk=32, page_size=4, decode_steps=4, num_shards=2, min_chunk=32
)
SPEC = ExtrasSpec.create(BUCKETS, 97)


def step(shape: StepShape) -> StepBatch:
    """Of nobody, but with numbers that tell its arrays apart."""
    none = [np.zeros(0, np.int32)] * 2
    empty = batch.build(StepPlan([[], []], [[], []], none, none, shape.num_steps), shape, BUCKETS.empty_table())
    leaves, structure = jax.tree.flatten(empty)
    return jax.tree.unflatten(structure, [(a + i).astype(a.dtype) for i, a in enumerate(map(np.asarray, leaves))])


def some_extras(num_loads: int, *, rows: bool, score: bool) -> Extras:
    load = extras.slot_load([None, None], SPEC)
    loads = tuple(load._replace(slots=load.slots + 1 + i) for i in range(num_loads))
    full_rows = FullRows(np.eye(2, 4, dtype=bool), np.array(True), np.array(False))
    score_part = Score(np.arange(64, dtype=np.int32).reshape(2, 32), np.array(7, np.int32))
    return Extras(loads, full_rows if rows else None, score_part if score else None)


@pytest.mark.parametrize("shape", BUCKETS.shapes(), ids=str)
def test_every_shape_of_a_step(shape: StepShape):
    check(shape, step(shape), None)


@pytest.mark.parametrize("num_loads", [0, 1, 3])
@pytest.mark.parametrize(("rows", "score"), [(True, False), (False, True), (True, True)])
def test_every_kind_of_extras(num_loads: int, rows: bool, score: bool):
    shape = BUCKETS.shapes()[0]
    check(shape, step(shape), some_extras(num_loads, rows=rows, score=score))


def check(shape: StepShape, of_step: StepBatch, with_extras: Extras | None) -> None:
    frame = frames.read(reader(lockstep.encode_step(shape, of_step, with_extras)))
    found = lockstep.decode_step(frame)
    expected = (shape, of_step, with_extras)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, wanted, strict=isinstance(wanted, np.ndarray))


def test_a_step_with_an_array_too_many_is_refused():
    shape = BUCKETS.shapes()[0]
    frame = frames.read(reader(lockstep.encode_step(shape, step(shape), None)))
    with pytest.raises(ValueError, match="a step with 16 arrays in place of 15"):
        lockstep.decode_step(Frame(Kind.STEP, frame.value, [*frame.arrays, frame.arrays[0]]))
