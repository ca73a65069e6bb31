"""Products of 8 bits: as near as their bits allow, scaled exactly, the same however a tensor is divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import hardware
from lm.config import ConfigError
from lm.nn import fp8
from lm.nn.linear import Linear

# Of numbers of random sizes: rounding to m bits after the point is off by up to 2^-(m+1) of a number, in the
# root mean square by 0.42 of that, and a product by that of both of its sides.
E4M3, E5M2 = 0.42 * 2**-4, 0.42 * 2**-3


def tensors(seed=0, small=1e-6):
    rng = np.random.default_rng(seed)
    x, kernel, dy = (
        rng.normal(size=s).astype(np.float32) for s in ((4, 32, 64), (64, 48), (4, 32, 48))
    )
    return x, kernel / 8, dy * small


def relative(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float32) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("small", [1.0, 1e-6])
def test_a_product_and_its_gradients_are_off_by_what_the_bits_say(dtype, small):
    x, kernel, dy = tensors(small=small)
    y, pull = jax.vjp(jax.jit(fp8.product), x.astype(dtype), kernel)
    dx, dkernel = pull(dy.astype(dtype))
    assert (y.dtype, dx.dtype, dkernel.dtype) == (dtype, dtype, jnp.float32)
    forward, backward = np.hypot(E4M3, E4M3), np.hypot(E4M3, E5M2)
    assert relative(y, x @ kernel) == pytest.approx(forward, rel=0.15)
    assert relative(dx, dy @ kernel.T) == pytest.approx(backward, rel=0.15)
    assert relative(dkernel, np.einsum("blk,bln->kn", x, dy)) == pytest.approx(backward, rel=0.15)


@pytest.mark.parametrize("dtype", [fp8.FORWARD, fp8.BACKWARD])
@pytest.mark.parametrize("largest", [448.0, 449.0, 3.7e-9, 2e20, 0.0, 1.0])
def test_scales_are_powers_of_two_that_fit_and_waste_at_most_half(dtype, largest):
    x = jnp.array([largest, -largest / 3, largest / 1000], jnp.bfloat16)
    q, scale = fp8.rounded(x, dtype)
    mantissa, _ = np.frexp(np.float32(scale))
    assert mantissa == 0.5 and q.dtype == dtype
    if largest:
        assert 0.49 <= float(jnp.abs(q).max().astype(jnp.float32)) / jnp.finfo(dtype).max <= 1
        # Nothing is lost but the bits: the largest comes back as its own rounding, without a bias.
        restored = q.astype(jnp.float32) * scale
        bits = 2 ** -(jnp.finfo(dtype).nmant + 1.0)
        assert np.all(np.abs(restored[:2] / x[:2].astype(jnp.float32) - 1) <= bits)


def test_parts_of_a_tensor_with_scales_of_their_own_round_as_the_whole():
    """But where they come near 0: so accumulation, stages and devices change nothing but that."""
    x, *_ = tensors()
    x *= np.array([1, 0.3, 2, 0.01], np.float32).reshape(4, 1, 1)
    q, scale = fp8.rounded(jnp.asarray(x), fp8.FORWARD)
    apart, scales = jax.vmap(lambda rows: fp8.rounded(rows, fp8.FORWARD))(x)
    assert len(set(scales.tolist())) > 2
    a = np.asarray(q.astype(jnp.float32) * scale)
    b = np.asarray(apart.astype(jnp.float32) * scales.reshape(4, 1, 1))
    normal = np.abs(a) >= float(scale) * 2**-6  # e4m3's least number that has all its bits
    assert 0.5 < normal.mean() < 1
    np.testing.assert_array_equal(a[normal], b[normal])


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_number_that_is_not_finite_makes_all_so(bad):
    x, kernel, dy = tensors()
    x[1, 2, 3] = bad
    y, pull = jax.vjp(fp8.product, x, kernel)
    assert not np.isfinite(y).any()
    assert not np.isfinite(pull(dy)[1]).any()


def test_zeros_are_zeros():
    y, pull = jax.vjp(fp8.product, jnp.zeros((3, 8)), jnp.zeros((8, 5)))
    assert not y.any() and not any(leaf.any() for leaf in pull(jnp.zeros((3, 5))))


class Device:
    def __init__(self, capability, kind):
        self.compute_capability, self.device_kind = capability, kind


@pytest.mark.parametrize(
    ("capability", "kind", "has"),
    [
        ("9.0", "NVIDIA H100 80GB HBM3", True),
        ("8.9", "NVIDIA L4", True),
        ("10.0", "NVIDIA B200", True),
        ("8.0", "NVIDIA A100-SXM4-40GB", False),
        ("gfx942", "AMD Instinct MI300X", False),
    ],
)
def test_a_device_without_is_refused_by_name(monkeypatch, capability, kind, has):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(capability, kind)])
    assert hardware.has_fp8() == has
    if has:
        assert fp8.check("fp8") and not fp8.check("")
        return
    with pytest.raises(ConfigError) as error:
        fp8.check("fp8")
    assert kind in str(error.value) and capability in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cpu_is_refused_by_name():
    init = jax.nn.initializers.normal()
    module = Linear((6, 5), ("embed", "mlp"), jnp.float32, init, matmul_dtype="fp8")
    with pytest.raises(ConfigError, match=r"^model\.matmul_dtype='fp8': needs .* 8\.9 .* cpu"):
        module.init(jax.random.key(0), jnp.zeros((2, 6)))
