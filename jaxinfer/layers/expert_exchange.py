"""Expert parallelism where tokens are split over the devices that the experts are split over: each goes there and back.

Rows are sorted by the device that has their expert, as in MegaBlocks (Gale et al., arXiv:2211.15841), so that no room
is kept for every expert. Room for every device is needed, for an all-to-all has a static shape: as much as a device's
share is where all get alike. GShard (Lepikhin et al., arXiv:2006.16668) drops what is beyond; here it goes in another
round, so every row is computed, and buffers do not grow with the skew of the routing.

`jax.lax.ragged_all_to_all` would need one round: XLA:CPU of jax 0.10 and 0.12 does not have it, and what a device
receives would need room for the rows of all.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class _Routes(NamedTuple):
    """Where a device's R rows go, and what it gets, `capacity` of each pair of devices in a round."""

    order: jax.Array  # int32 [R]; the rows by slot, those that go nowhere last
    starts: jax.Array  # int32 [devices]; the place in `order` of the first row to each
    device: jax.Array  # int32 [R]; to which each row goes
    place: jax.Array  # int32 [R]; among the rows that go there, by slot
    is_sent: jax.Array  # bool [R]
    ends: jax.Array  # int32 [devices, local slots]; of each slot's rows among those that a device sends here
    num_rounds: jax.Array  # int32; the same on all devices


def capacity(num_rows: int, num_devices: int) -> int:
    """Rows that one device sends to each in a round: one round does where all get alike.

    Rows that are routed at random take two: the fullest of all pairs has a little more than its share.
    """
    return -(-num_rows // num_devices)


def map_on_owners(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    slots: jax.Array,
    *,
    num_local: int,
    num_devices: int,
    axes: tuple[str, ...],
) -> jax.Array:
    """function(row, slot) of each token and each of its slots, computed by the device that has the slot.

    For use inside `shard_map`. Each of the `num_devices` along the mesh axes `axes` has tokens x [S, D] of its own,
    and `num_local` slots: the first those from 0 on. `slots` int32 [S, k] count over all of them; one behind the last
    goes nowhere. The function takes rows [N, D] and int32 [N, 1], slots of this device or `num_local` for rows that
    count for nothing, and gives [N, 1, D]. -> [S, k, D], zero for what went nowhere.

    A round is two all-to-alls of as many rows as a device has, S * k, if they divide over the devices; before the
    first the devices tell each other how many rows go to each slot, in one small all-gather. What is computed of a row
    does not depend on the others.
    """
    size, k = x.shape[-1], slots.shape[-1]
    room = capacity(slots.size, num_devices)
    routes = _routes(slots.reshape(-1), num_local, num_devices, room, axes)
    swap = lambda rows: lax.all_to_all(rows, axes, split_axis=0, concat_axis=0)  # noqa: E731

    def one_round(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, results = state
        within = i * room + jnp.arange(room, dtype=jnp.int32)
        # What is beyond a device's rows is somebody else's row, which the other side knows not to count.
        token = routes.order.at[routes.starts[:, None] + within].get(mode="clip") // k
        local = jnp.sum(within[None, :, None] >= routes.ends[:, None, :], axis=-1, dtype=jnp.int32)
        computed = function(swap(x[token]).reshape(-1, size), local.reshape(-1, 1))
        back = swap(computed.reshape(num_devices, room, size))
        is_back = routes.is_sent & (routes.place // room == i)
        return i + 1, jnp.where(is_back[:, None], back[routes.device, routes.place % room], results)

    # Something of this layer to be written over. Of zeros XLA makes those of all layers at once, and keeps them.
    start = (jnp.zeros((), jnp.int32), jnp.repeat(x, k, axis=0))
    _, results = lax.while_loop(lambda state: state[0] < routes.num_rounds, one_round, start)
    return jnp.where(routes.is_sent[:, None], results, 0).reshape(*slots.shape, size)


def _routes(slots: jax.Array, num_local: int, num_devices: int, room: int, axes: tuple[str, ...]) -> _Routes:
    num_slots = num_local * num_devices
    counts = jnp.sum(slots[:, None] == jnp.arange(num_slots), axis=0, dtype=jnp.int32)
    sent = lax.all_gather(counts, axes).reshape(num_devices, num_devices, num_local)  # by source, device and slot
    of_pairs = jnp.sum(sent, axis=-1, dtype=jnp.int32)
    here = lax.axis_index(axes)
    starts = jnp.cumsum(of_pairs[here], dtype=jnp.int32) - of_pairs[here]
    order = jnp.argsort(slots)
    device = jnp.minimum(slots // num_local, num_devices - 1)
    return _Routes(
        order=order,
        starts=starts,
        device=device,
        place=jnp.argsort(order) - starts[device],
        is_sent=slots < num_slots,
        ends=jnp.cumsum(sent[:, here], axis=-1, dtype=jnp.int32),
        num_rounds=(jnp.max(of_pairs) + room - 1) // room,
    )
