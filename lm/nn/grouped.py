"""Products of groups of rows, each group with a kernel of its own: the tokens of each expert, sorted.

Letters: E groups, M rows, K and N the kernel's sides, P blocks of T rows.
"""

import functools

import jax
import jax.numpy as jnp

from lm.nn.linear import product, wide

BLOCK = 128  # rows of one product on a CPU


def block_rows(num_rows: int, num_groups: int) -> int:
    """Return at multiples of how many rows groups shall begin that have `num_rows` together.

    On a CPU a group is computed in blocks: `jax.lax.ragged_dot` there computes all rows with all kernels, in
    ten times a block's time of 8 groups. Elsewhere it has kernels of its own.
    """
    if jax.default_backend() != "cpu":
        return 1
    return min(BLOCK, 1 << (num_rows // num_groups).bit_length())


def grouped_product(
    x_MK: jax.Array, kernel_EKN: jax.Array, size_E: jax.Array, block: int
) -> jax.Array:
    """Return [M, N] of rows that lie in consecutive groups, each a multiple of `block`, times their kernels.

    Rows after the last group may hold anything.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.ragged_dot(x_MK, kernel_EKN, size_E)
    return by_blocks(x_MK, kernel_EKN, jnp.cumsum(size_E) // block, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def by_blocks(x_MK: jax.Array, kernel_EKN: jax.Array, end_E: jax.Array, block: int) -> jax.Array:
    """Return `grouped_product` by a loop over the blocks in use; groups end before the blocks `end`."""

    def body(number, y_PTN):
        expert = jnp.searchsorted(end_E, number, side="right")
        return y_PTN.at[number].set(product(x_PTK[number], kernel_EKN[expert]))

    x_PTK = x_MK.reshape(-1, block, x_MK.shape[1])
    y_PTN = jnp.zeros((*x_PTK.shape[:2], kernel_EKN.shape[2]), x_MK.dtype)
    return jax.lax.fori_loop(0, end_E[-1], body, y_PTN).reshape(len(x_MK), -1)


def _by_blocks_backward(block, operands, dy_MN):
    x_MK, kernel_EKN, end_E = operands
    x_PTK = x_MK.reshape(-1, block, x_MK.shape[1])
    dy_PTN = dy_MN.reshape(-1, block, dy_MN.shape[1])

    def body(number, carry):
        dx_PTK, dkernel_EKN = carry
        expert = jnp.searchsorted(end_E, number, side="right")
        dy_TN = dy_PTN[number]
        dx_PTK = dx_PTK.at[number].set(dy_TN @ kernel_EKN[expert].T)
        return dx_PTK, dkernel_EKN.at[expert].add(x_PTK[number].T @ dy_TN)

    zeros = jnp.zeros_like(x_PTK), jnp.zeros(kernel_EKN.shape, wide(kernel_EKN.dtype))
    dx_PTK, dkernel_EKN = jax.lax.fori_loop(0, end_E[-1], body, zeros)
    return dx_PTK.reshape(x_MK.shape), dkernel_EKN.astype(kernel_EKN.dtype), None


by_blocks.defvjp(
    lambda x, kernel, end, block: (by_blocks(x, kernel, end, block), (x, kernel, end)),
    _by_blocks_backward,
)
