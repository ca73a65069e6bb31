import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn.rotary import SCALINGS, Rotary, rotate

K, BASE = 6, 100.0
LLAMA3 = {"scaling": "llama3", "factor": 8.0, "original_length": 8192}
YARN = {"scaling": "yarn", "factor": 4.0, "original_length": 2048}


def test_scores_depend_on_the_distance_alone():
    query, key = np.random.default_rng(0).normal(size=(2, K)).astype(np.float32)

    @jax.jit
    def turned(x_K, positions_L):
        waves = Rotary(BASE).waves(positions_L[None], K)
        return rotate(jnp.tile(x_K, (1, 1, len(positions_L), 1)), waves)[0, 0]

    positions = np.arange(40)
    scores = np.asarray(turned(query, positions)) @ np.asarray(turned(key, positions)).T
    moved = np.asarray(turned(query, positions + 900)) @ np.asarray(turned(key, positions + 900)).T
    np.testing.assert_allclose(moved, scores, atol=2e-3)  # angles of 900 are exact to 1e-4
    for distance in range(-39, 40):
        np.testing.assert_allclose(np.diff(np.diagonal(scores, distance)), 0, atol=1e-5)
    np.testing.assert_allclose(scores[0, 0], query @ key, atol=1e-6)
    by_distance = [*scores[0, :0:-1], *scores[:, 0]]
    assert np.abs(np.diff(sorted(by_distance))).min() > 1e-5, "every distance has its own score"


def test_wavelengths_run_from_two_pi_to_the_base():
    cos, sin = Rotary(BASE).waves(jnp.array([[0, 1, 10]]), K)
    assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == sin.shape == (1, 3, K // 2)
    slowest = BASE ** (-(K - 2) / K)
    for column, angle in ((0, 1.0), (-1, slowest)):
        angles = np.array([0, 1, 10]) * angle
        np.testing.assert_allclose(cos[0, :, column], np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(sin[0, :, column], np.sin(angles), atol=1e-6)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_factor_of_one_changes_nothing(scaling):
    rotary = Rotary(BASE, scaling=scaling, factor=1.0, original_length=64)
    np.testing.assert_allclose(rotary.frequencies(K), Rotary(BASE).frequencies(K), rtol=1e-7)
    assert rotary.amplitude == 1.0


def test_linear_scaling_divides_positions():
    at, further = jnp.array([[3, 5]]), jnp.array([[12, 20]])
    for wave, far in zip(
        Rotary(BASE).waves(at, K),
        Rotary(BASE, scaling="linear", factor=4.0).waves(further, K),
        strict=True,
    ):
        np.testing.assert_allclose(far, wave, atol=1e-6)


def test_llama3_keeps_short_wavelengths_and_scales_long_ones():
    """By hand, from the two wavelengths of the paper's model: 8192 / 1 and 8192 / 4."""
    plain = Rotary(5e5).frequencies(128)
    scaled = Rotary(5e5, **LLAMA3).frequencies(128)
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    assert short.sum() > 10 and long.sum() > 10 and (~short & ~long).sum() > 3
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    ratio = (scaled / plain)[~short & ~long]
    assert (np.diff(ratio) < 0).all() and (ratio > 1 / 8).all() and (ratio < 1).all()
    turns = 8192 / wavelengths[~short & ~long]
    np.testing.assert_allclose(ratio, (1 - (4 - turns) / 3 * 7 / 8), rtol=1e-5)


def test_yarn_keeps_fast_frequencies_and_scales_slow_ones():
    plain, ratio = Rotary(1e4).frequencies(128), None
    turns = 2048 * plain / (2 * math.pi)
    for truncate in (True, False):
        ratio = Rotary(1e4, **YARN, truncate=truncate).frequencies(128) / plain
        assert (np.diff(ratio) <= 1e-6).all()
        # Whole dimensions widen the ramp by less than one on either side.
        kept, scaled = np.flatnonzero(turns >= 32), np.flatnonzero(turns <= 1)
        np.testing.assert_allclose(ratio[kept[:-1]], 1, rtol=1e-6)
        np.testing.assert_allclose(ratio[scaled[1:]], 1 / 4, rtol=1e-6)
        assert ratio[kept[-1] + 1] < 1 and ratio[scaled[0] - 1] > 1 / 4
    assert 0 < np.abs(ratio - Rotary(1e4, **YARN).frequencies(128) / plain).max() < 0.1


def test_yarn_multiplies_cosine_and_sine():
    assert Rotary(1e4, **YARN).amplitude == pytest.approx(0.1 * math.log(4) + 1)
    both = Rotary(1e4, **YARN, mscale=0.8, mscale_all_dim=0.5)
    assert both.amplitude == pytest.approx((0.08 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    assert Rotary(1e4, **YARN, mscale=0.8).amplitude == Rotary(1e4, **YARN).amplitude
    given = Rotary(1e4, **YARN, attention_factor=1.5)
    assert given.amplitude == 1.5
    at = jnp.array([[0, 7]])
    for wave, larger in zip(
        Rotary(1e4, **YARN, attention_factor=1.0).waves(at, K), given.waves(at, K), strict=True
    ):
        np.testing.assert_allclose(larger, 1.5 * wave, rtol=1e-6)
