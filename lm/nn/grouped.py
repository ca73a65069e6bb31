"""Products of groups of rows, each group with a kernel of its own: the tokens of each expert, sorted.

Letters: E groups, M rows, K and N the kernel's sides, P blocks of T rows.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.nn.linear import KEPT, product, wide

BLOCK = 128  # rows of one product on a CPU
OVER_ROWS = (
    jax.lax.RaggedDotDimensionNumbers(  # of x[M, K] and y[M, N]: their products summed over a group
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
)


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

    In the type of x, to which kernels are rounded; their gradients are not. Rows after the last group may
    hold anything.
    """
    if jax.default_backend() != "cpu":
        return checkpoint_name(_ragged(x_MK, kernel_EKN, size_E), KEPT)
    num_blocks = len(x_MK) // block
    end_E = jnp.cumsum(size_E) // block
    group_P = (jnp.arange(num_blocks)[:, None] >= end_E[None]).sum(1)
    return checkpoint_name(by_blocks(x_MK, kernel_EKN, group_P, end_E[-1]), KEPT)


@jax.custom_vjp
def _ragged(x_MK: jax.Array, kernel_EKN: jax.Array, size_E: jax.Array) -> jax.Array:
    """Return [M, N] as `grouped_product`, by what accelerators have for it."""
    return jax.lax.ragged_dot(x_MK, kernel_EKN.astype(x_MK.dtype), size_E)


def _ragged_backward(operands, dy_MN):
    x_MK, kernel_EKN, size_E = operands
    dx_MK = jax.lax.ragged_dot(dy_MN, kernel_EKN.astype(dy_MN.dtype).swapaxes(1, 2), size_E)
    dkernel_EKN = jax.lax.ragged_dot_general(
        x_MK, dy_MN, size_E, OVER_ROWS, preferred_element_type=kernel_EKN.dtype
    )
    return dx_MK, dkernel_EKN, None


_ragged.defvjp(lambda *operands: (_ragged(*operands), operands), _ragged_backward)


@jax.custom_vjp
def by_blocks(
    x_MK: jax.Array, kernel_EKN: jax.Array, group_P: jax.Array, num_used: jax.Array
) -> jax.Array:
    """Return [M, N] of equal blocks of rows, each times its group's kernel, by a loop over those in use."""

    def body(block, y_PTN):
        y_TN = product(_at(x_PTK, block), _at(kernel_EKN, _at(group_P, block)))
        return jax.lax.dynamic_update_index_in_dim(y_PTN, y_TN, block, 0)

    x_PTK = x_MK.reshape(len(group_P), -1, x_MK.shape[1])
    y_PTN = jnp.zeros((*x_PTK.shape[:2], kernel_EKN.shape[2]), x_MK.dtype)
    return jax.lax.fori_loop(0, num_used, body, y_PTN).reshape(len(x_MK), -1)


def _at(array: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, index, keepdims=False)


def _by_blocks_backward(operands, dy_MN):
    x_MK, kernel_EKN, group_P, num_used = operands
    x_PTK, dy_PTN = (array.reshape(len(group_P), -1, array.shape[1]) for array in (x_MK, dy_MN))
    kind = wide(kernel_EKN.dtype)

    def body(block, carry):
        dx_PTK, dkernel_EKN = carry
        group, dy_TN = _at(group_P, block), _at(dy_PTN, block)
        dx_TK = dy_TN @ _at(kernel_EKN, group).T.astype(dy_TN.dtype)
        dkernel_KN = jnp.matmul(_at(x_PTK, block).T, dy_TN, preferred_element_type=kind)
        dkernel_KN += _at(dkernel_EKN, group)
        return (
            jax.lax.dynamic_update_index_in_dim(dx_PTK, dx_TK, block, 0),
            jax.lax.dynamic_update_index_in_dim(dkernel_EKN, dkernel_KN, group, 0),
        )

    zeros = jnp.zeros_like(x_PTK), jnp.zeros(kernel_EKN.shape, kind)
    dx_PTK, dkernel_EKN = jax.lax.fori_loop(0, num_used, body, zeros)
    return dx_PTK.reshape(x_MK.shape), dkernel_EKN.astype(kernel_EKN.dtype), None, None


by_blocks.defvjp(lambda *operands: (by_blocks(*operands), operands), _by_blocks_backward)
