"""Which of a sequence's pages are on this device, where `context` spreads them over several. For inside `shard_map`."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.page_allocator import device_and_row


def own_page(page_ids: jax.Array, valid: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
    """Where to write: the device's own row of each page that is `valid` and here, else of its scratch page."""
    device, row = device_and_row(page_ids, lax.axis_size(axis_names))
    return jnp.where(valid & (device == lax.axis_index(axis_names)), row, 0)


def own_pages(block_tables: jax.Array, axis_names: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Of int32 [B, M] the pages that are here: their rows, and which columns they stand in, int32 [B, M] each.

    In order of column, from the left; then the scratch page, in column M. Pages may be anywhere: a row may have all of
    its pages here, or none. On device 1 of 2, [4, 7, 3, 0] -> rows [3, 1, 0, 0], columns [1, 2, 4, 4].
    """
    device, row = device_and_row(block_tables, lax.axis_size(axis_names))
    num_columns = block_tables.shape[1]
    is_here = (device == lax.axis_index(axis_names)) & (row > 0)  # unused entries name a scratch page
    columns = jnp.sort(jnp.where(is_here, jnp.arange(num_columns, dtype=jnp.int32), num_columns), axis=1)
    return jnp.take_along_axis(row, columns, axis=1, mode="fill", fill_value=0), columns
