"""Rows that are computed where their slot is, against NumPy, however skewed the routing is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxinfer.layers import expert_exchange
from jaxinfer.meshes import make_mesh

NUM_TOKENS, K, SIZE, NUM_LOCAL = 6, 2, 3, 2  # of a device
MESHES = {2: "expert:2", 4: "data:2,expert:4", 8: "expert:8"}


@functools.cache
def exchange(num_devices: int):
    """The compiled op over a mesh. A row becomes what only the owner of its slot knows: row * factor + 1."""
    num_slots = num_devices * NUM_LOCAL
    mesh, tokens = make_mesh(MESHES[num_devices]), PartitionSpec(("data", "expert"))
    if "data" not in mesh.shape:
        tokens = PartitionSpec("expert")

    def local(x, slots, factors):
        def compute(rows, slot):
            assert rows.shape == (num_devices * expert_exchange.capacity(NUM_TOKENS * K, num_devices), SIZE)
            own = jnp.append(factors, jnp.nan)[slot[:, 0]]  # of a row that counts for nothing, what would be seen
            return (rows * own[:, None] + 1)[:, None]

        axes = {"num_local": NUM_LOCAL, "num_devices": num_devices, "axes": ("expert",)}
        return expert_exchange.map_on_owners(compute, x, slots, **axes)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, tokens, PartitionSpec("expert")),
        out_specs=tokens,
        check_vma=False,
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((mesh.size * NUM_TOKENS, SIZE)).astype(np.float32)
    factors = rng.standard_normal(num_slots).astype(np.float32)
    return jax.jit(mapped), x, factors


def check(num_devices: int, slots: np.ndarray) -> None:
    mapped, x, factors = exchange(num_devices)
    out = np.asarray(mapped(x, slots.astype(np.int32), factors))
    is_sent = slots < len(factors)
    own = np.where(is_sent, np.append(factors, 0)[slots], 0).astype(np.float64)
    exact = np.where(is_sent[..., None], x[:, None].astype(np.float64) * own[..., None] + 1, 0)
    np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_devices", MESHES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_row_is_computed_where_its_slot_is(num_devices: int, data: st.DataObject):
    """Whatever the routing: all to one slot, to one device, from one device, nothing at all, and in between."""
    num_slots, num_rows = num_devices * NUM_LOCAL, len(exchange(num_devices)[1])
    legal = data.draw(st.lists(st.integers(0, num_slots), min_size=1, max_size=num_slots + 1))
    seed = data.draw(st.integers(0, 2**32 - 1))
    check(num_devices, np.random.default_rng(seed).choice(legal, (num_rows, K)))


@pytest.mark.parametrize("num_devices", MESHES)
def test_extreme_routings(num_devices: int):
    num_slots, num_rows = num_devices * NUM_LOCAL, len(exchange(num_devices)[1])
    for slot in (0, num_slots - 1, num_slots):  # to the first, to the last, to none
        check(num_devices, np.full((num_rows, K), slot))
    only_one_sends = np.full((num_rows, K), num_slots)
    only_one_sends[NUM_TOKENS : 2 * NUM_TOKENS] = 1
    check(num_devices, only_one_sends)


def test_a_row_does_not_depend_on_its_neighbours():
    """Bit by bit, and though the others are not finite."""
    mapped, x, factors = exchange(4)
    rng = np.random.default_rng(1)
    slots = rng.integers(0, len(factors), (len(x), K)).astype(np.int32)
    alone = np.asarray(mapped(x, slots, factors))[0]
    poisoned, elsewhere = x.copy(), rng.integers(0, len(factors) + 1, slots.shape).astype(np.int32)
    poisoned[1:], elsewhere[0] = np.nan, slots[0]
    np.testing.assert_array_equal(np.asarray(mapped(poisoned, elsewhere, factors))[0], alone)
