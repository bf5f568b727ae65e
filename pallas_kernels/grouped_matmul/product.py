"""What a function of rows in groups is made of."""

from typing import Protocol

import jax


class Product(Protocol):
    """Rows times the weight of the group that each is in."""

    def __call__(self, x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [rows, I], weight [..., O, I] and bias [..., O] as the function's parameters have them -> [rows, ..., O].

        Summed in float32 and rounded once to x's dtype, in which the bias is added.
        """
        ...
