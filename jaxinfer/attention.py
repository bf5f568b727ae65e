"""What a model attends to: nothing but its own tokens (training), or a paged cache (inference)."""

import jax
import jax.numpy as jnp

from jaxinfer.layers.linear import matmul_precision


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """Every token attends to itself and those before it; no cache.

    q [B, T, N, H], k and v [B, T, K, H] with N a multiple of K -> [B, T, N, H]. Softmax in float32.
    Two batched einsums: on XLA:CPU faster than `jax.nn.dot_product_attention`.
    """
    b, t, n, h = q.shape
    num_kv_heads = k.shape[2]
    q = q.reshape(b, t, num_kv_heads, n // num_kv_heads, h)
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", q * scale, k, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=precision).reshape(b, t, n, h)
