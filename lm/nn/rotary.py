"""Rotary positions, and the ways to stretch them past the length that a model was trained on.

Su et al. 2021 (arXiv 2104.09864), the two halves of a head rotated against each other, as in GPT-NeoX
and Llama. Scaling: linear, Chen et al. 2023 (arXiv 2306.15595); llama3, "The Llama 3 Herd of Models",
2024 (arXiv 2407.21783); YaRN, Peng et al. 2023 (arXiv 2309.00071).

What differs: frequencies are made once, in float64, and rounded to float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lm.nn.linear import wide

SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The angle of pair f of a head at position p is p frequency[f], frequency[f] = base^(-2f / K), scaled.

    linear: every frequency is divided by `factor`.
    llama3: those whose wavelength is longer than original_length / low_frequency are; shorter than
      original_length / high_frequency, none; between, a share linear in the number of turns.
    yarn: those that turn at most `beta_slow` times in the original length are; at least `beta_fast`
      times, none; between, a share linear in f. Cosine and sine are multiplied by `amplitude`.

    Attributes:
      base: the longest wavelength is nearly 2 pi times this.
      factor: how many times as many positions as before.
      original_length: positions before.
      attention_factor: the amplitude of yarn; 0 = 0.1 log(factor) + 1, or with `mscale` and
        `mscale_all_dim` the quotient of 0.1 m log(factor) + 1 with either as m.
      truncate: the range between `beta_slow` and `beta_fast` in whole f.
    """

    base: float
    scaling: str = "none"
    factor: float = 1.0
    original_length: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Return float32 radians a position [K/2]."""
        plain_F = self.base ** (-np.arange(0, head_dim, 2) / head_dim)
        kept_F = {
            "none": lambda: np.ones_like(plain_F),
            "linear": lambda: np.zeros_like(plain_F),
            "llama3": lambda: self._kept_by_turns(plain_F),
            "yarn": lambda: self._kept_by_index(head_dim),
        }[self.scaling]()
        return (plain_F * (kept_F + (1 - kept_F) / self.factor)).astype(np.float32)

    def _kept_by_turns(self, plain_F: np.ndarray) -> np.ndarray:
        """Return which share of each frequency llama3 keeps."""
        turns_F = self.original_length * plain_F / (2 * math.pi)
        share_F = (turns_F - self.low_frequency) / (self.high_frequency - self.low_frequency)
        return np.clip(share_F, 0, 1)

    def _kept_by_index(self, head_dim: int) -> np.ndarray:
        """Return which share of each frequency yarn keeps."""

        def index(turns: float) -> float:
            length = self.original_length / (turns * 2 * math.pi)
            return head_dim * math.log(length) / (2 * math.log(self.base))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # a step, as in transformers
        return 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.scaling != "yarn":
            return 1.0
        return self.attention_factor or (
            self._amplitude(self.mscale) / self._amplitude(self.mscale_all_dim)
            if self.mscale and self.mscale_all_dim
            else self._amplitude(1.0)
        )

    def _amplitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def waves(self, positions_BL: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Return float32 (cosines, sines) [B, L, K/2] of the angles at `positions_BL`."""
        frequencies_11F = jnp.asarray(self.frequencies(head_dim))[None, None]
        angles_BLF = positions_BL[:, :, None].astype(jnp.float32) * frequencies_11F
        cos_BLF, sin_BLF = jnp.cos(angles_BLF), jnp.sin(angles_BLF)
        if self.amplitude == 1:
            return cos_BLF, sin_BLF
        return cos_BLF * self.amplitude, sin_BLF * self.amplitude


def rotate(x_BNLK: jax.Array, waves: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the halves of each head of `x` by what `Rotary.waves` gives for its positions."""
    cos, sin = (wave_BLF[:, None] for wave_BLF in waves)
    first, second = jnp.split(x_BNLK.astype(wide(x_BNLK.dtype)), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BNLK.dtype)
