"""Products of groups of rows: blocks, and what accelerators run, equal a loop over the groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn import grouped

K, N = 5, 3


@pytest.mark.parametrize("path", ["blocks", "ragged"])
def test_every_group_has_its_kernel_and_its_gradient(path, monkeypatch):
    """One group is empty, one has several blocks, and rows follow the last one."""
    if path == "ragged":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    block, sizes = (4, [4, 0, 8, 4]) if path == "blocks" else (1, [3, 0, 7, 2])
    random = np.random.default_rng(0)
    x = random.normal(size=(20, K)).astype(np.float32)
    kernel = random.normal(size=(4, K, N)).astype(np.float32)
    used = sum(sizes)

    def run(x, kernel):
        y = grouped.grouped_product(x, kernel, jnp.array(sizes), block)
        return jnp.square(y[:used]).sum(), y

    (_, found), gradients = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(
        jnp.array(x), jnp.array(kernel)
    )
    ends = np.cumsum(sizes)
    dx, dkernel = np.zeros_like(x), np.zeros_like(kernel)
    for group, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        rows = slice(end - size, end)
        y = x[rows] @ kernel[group]
        np.testing.assert_allclose(found[rows], y, rtol=1e-5, atol=1e-5)
        dx[rows], dkernel[group] = 2 * y @ kernel[group].T, x[rows].T @ (2 * y)
    np.testing.assert_allclose(gradients[0], dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[1], dkernel, rtol=1e-5, atol=1e-5)


def test_blocks_are_no_larger_than_a_group():
    assert grouped.block_rows(2, 8) == 1  # a token that decodes meets no padding
    assert grouped.block_rows(8 * 5, 8) == 8
    assert grouped.block_rows(10**6, 8) == grouped.BLOCK


@pytest.mark.parametrize("path", ["blocks", "ragged"])
def test_of_bfloat16_rows_a_kernel_has_a_gradient_that_is_not_rounded(path, monkeypatch):
    if path == "ragged":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(8, K)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(2, K, N)), jnp.float32)

    def total(kernel):
        return jnp.square(grouped.grouped_product(x, kernel, jnp.array([4, 4]), 4)).sum(dtype="f")

    gradient = jax.grad(total)(kernel)
    assert gradient.dtype == jnp.float32
    assert (gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32)).any()
