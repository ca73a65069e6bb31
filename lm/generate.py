"""Continue token sequences with any model that writes: greedy, temperature, top-k, top-p. Fill masks.

All shapes are static. A prompt is padded to a power of two and read at once (prefill); then a jitted
scan makes `tokens_per_call()` tokens a call, sampling on the device, and the host only collects them. When a
model's positions are used up, the newest half of them is read again as the context and generation goes
on; `context_start` is that rule, so that an uncached forward pass can follow it token for token. An
encoder-decoder reads its sources in the same call.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm.config import ConfigError, check_seed
from lm.nn.embed import MASKED_LOGIT

FILTERED = -jnp.inf
# What a model reads of a row, and of its source.
ROW = ("inputs", "segments", "positions")
MOST_TOKENS = 2**20  # of one call, far from sizes that XLA aborts at
SOURCE = ("source", "source_segments", "source_positions")


def tokens_per_call() -> int:
    """Return how many tokens a call makes.

    An accelerator should not wait for the host after each. On a CPU a call costs nothing, and XLA may
    make a loop over products with a vector one kernel, which runs in one thread (jax 0.12).
    """
    return 1 if jax.default_backend() == "cpu" else 16


def generate(
    model: nn.Module,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sources: Sequence[Sequence[int]] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Return for each prompt the tokens that follow it.

    Args:
      model: any but an encoder; it is cloned with a cache of the length needed.
      prompts: token ids, at least one each; they may differ in length.
      max_tokens: new tokens, at most, of each prompt.
      sources: for an encoder-decoder, the tokens that it reads for each prompt.
      temperature: of the distribution that is sampled; 0 = the most probable token.
      top_k: sample from the k most probable tokens only; 0 = all.
      top_p: sample from the smallest set of tokens with this probability (arXiv 1904.09751); 1 = all.
      seed: of the sampling. Token n of row b depends on (seed, b, n), not on the other rows.
      stop_tokens: a row ends before any of these.
      on_tokens: called with (row, new tokens) as they come.

    Raises ConfigError for an argument out of its range, or a token outside the vocabulary.
    """
    check_sampling(max_tokens, temperature, top_k, top_p, seed)
    _check_rows(model, prompts, sources)
    limit, rows = model.max_context, [list(map(int, prompt)) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    prompted = [len(row) for row in rows]
    model = model.clone(decode_length=_bucket(max(prompted) + max_tokens, limit))
    decoder = _decoder(model, tokens_per_call(), temperature, top_k, top_p)
    key, starts = jax.random.key(seed), list[int]()
    context: tuple[Any, ...] = ()
    open_rows = set(range(len(new))) if max_tokens else set()
    while open_rows:
        fresh = [context_start(len(r), n, limit) for r, n in zip(rows, prompted, strict=True)]
        if fresh != starts:
            starts = fresh
            recent = [row[at:] for row, at in zip(rows, starts, strict=True)]
            context = decoder.read(params, recent, sources)
        counts = [len(row) - n for row, n in zip(rows, prompted, strict=True)]
        *context, tokens = decoder.write(params, *context, jnp.asarray(counts), key)
        used = max(len(row) - at for row, at in zip(rows, starts, strict=True))
        room = limit - used + 1 if limit else decoder.chunk  # the last token is not read
        for b, made in enumerate(np.asarray(tokens)[:, :room].tolist()):
            rows[b] += made
            if b in open_rows:
                so_far = rows[b][prompted[b] :]
                before, new[b] = len(new[b]), _cut(so_far, max_tokens, stop_tokens)
                if len(new[b]) < len(so_far) or len(new[b]) == max_tokens:
                    open_rows.remove(b)
                if on_tokens is not None and new[b][before:]:
                    on_tokens(b, new[b][before:])
    return new


def context_start(length: int, prompt_length: int, limit: int) -> int:
    """Return where the context of the next token begins, of `length` tokens so far.

    Args:
      prompt_length: of these tokens, the prompt's.
      limit: positions of the model; 0 = no limit, and the context is everything.
    """
    if not limit:
        return 0
    start = max(0, prompt_length - max(1, limit // 2)) if prompt_length > limit else 0
    while length - start > limit:
        start += limit - limit // 2
    return start


def _cut(tokens: list[int], max_tokens: int, stop_tokens: Collection[int]) -> list[int]:
    ends = (place for place, token in enumerate(tokens) if token in stop_tokens)
    return tokens[: next(ends, max_tokens)][:max_tokens]


def fill_masks(
    model: nn.Module, params: Any, rows: Sequence[Sequence[int]], *, mask: int, top_k: int
) -> list[list[list[tuple[int, float]]]]:
    """Return for each row, and each place in it that holds the token `mask`, the best (id, probability).

    Args:
      model: a Linen model that accepts "masked" rows.
      top_k: how many of a place, best first.

    Raises ConfigError for a token outside the vocabulary, or a row longer than the model's.
    """
    _check_tokens(model.cfg.vocab_size, prompt=rows)
    if (longest := max(map(len, rows))) > model.cfg.max_length:
        raise ConfigError(
            f"prompt: {longest} tokens, and the model reads {model.cfg.max_length}; shorten it"
        )
    x_BLD = _jitted(model)({"params": params}, _batch(_padded(rows, model.cfg.max_length)))
    found: list[list[list[tuple[int, float]]]] = []
    for row, tokens in enumerate(rows):
        places = np.flatnonzero(np.asarray(tokens) == mask)
        logits = model.apply({"params": params}, x_BLD[row : row + 1, places], method="logits")
        best, ids = jax.lax.top_k(jax.nn.softmax(logits[0]), min(top_k, logits.shape[-1]))
        pairs = zip(np.asarray(ids).tolist(), np.asarray(best).tolist(), strict=True)
        found.append([list(zip(i, p, strict=True)) for i, p in pairs])
    return found


@functools.lru_cache(maxsize=8)
def _jitted(model: nn.Module) -> Callable:
    """Return the model's forward pass: compiled once, however often it is used."""
    return jax.jit(model.apply)


def _padded(rows: Sequence[Sequence[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as one array [B, L], padded to few lengths, and the length of each."""
    tokens_BL = np.zeros((len(rows), _bucket(max(map(len, rows)), limit)), np.int32)
    for b, row in enumerate(rows):
        tokens_BL[b, : len(row)] = row
    return tokens_BL, np.array([len(row) for row in rows], np.int32)


def _batch(rows: tuple[Any, Any], names: tuple[str, str, str] = ROW) -> dict[str, jax.Array]:
    """Return tokens [B, L] and lengths [B] as arrays `names`: tokens, segments (0 = padding), positions."""
    tokens_BL, lengths_B = rows
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)
    segments_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
    return dict(zip(names, (jnp.asarray(tokens_BL), segments_BL, positions_BL), strict=True))


def _check_rows(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]] | None,
) -> None:
    _check_tokens(model.cfg.vocab_size, prompt=prompts, source=sources)
    if ("source" in model.accepts) != (sources is not None):
        raise ConfigError(
            "sources: one for each prompt, of an encoder-decoder; other families read the prompt alone"
        )


def _check_tokens(vocab_size: int, **named: Sequence[Sequence[int]] | None) -> None:
    for name, rows in named.items():
        if rows is None:
            continue
        if not rows or not all(len(row) for row in rows):
            raise ConfigError(f"{name}: empty; give at least one token")
        for token in {int(token) for row in rows for token in row}:
            if not 0 <= token < vocab_size:
                raise ConfigError(f"{name}: {token} is no token of the model's {vocab_size}")


def check_sampling(
    max_tokens: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """Raise ConfigError for an argument out of its range."""
    for name, value, fits in (
        ("max_tokens", max_tokens, max_tokens >= 0),
        ("temperature", temperature, 0 <= temperature < math.inf),
        ("top_k", top_k, top_k >= 0),
    ):
        if not fits:
            raise ConfigError(f"{name}={value}: use a number, 0 or more")
    if max_tokens > MOST_TOKENS:
        raise ConfigError(f"max_tokens={max_tokens}: use {MOST_TOKENS:,} or fewer")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}: use a probability in (0, 1]")
    check_seed(seed)


def _bucket(length: int, limit: int) -> int:
    """Return the power of two that holds `length`, so that few shapes are compiled."""
    power = 1 << max(4, (length - 1).bit_length())
    return min(power, limit) if limit else power


@functools.lru_cache(maxsize=8)
def _decoder(*settings: Any) -> "Decoder":
    """Return the decoder of a model and a way of sampling: compiled once, however often it is used."""
    return Decoder(*settings)


class Decoder:
    """The two jitted functions of generation for one model and one way of sampling."""

    def __init__(self, model: nn.Module, chunk: int, temperature: float, top_k: int, top_p: float):
        self.model, self.chunk = model, chunk
        self.sample = functools.partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)
        self._read = jax.jit(self._prefill)
        self.write = jax.jit(self._write, donate_argnums=1)

    def read(self, params: Any, rows: Sequence[Sequence[int]], sources=None):
        """Return (cache, logits [B, V] of the next token, lengths [B]) after reading `rows`."""
        source = None if sources is None else _padded(sources, 0)
        return self._read(params, _padded(rows, self.model.max_context), source)

    def _prefill(self, params, rows, source):
        batch, lengths_B = _batch(rows), rows[1]
        if source is not None:
            batch |= _batch(source, SOURCE)
        x_BLD, new = self.model.apply({"params": params}, batch, decode=True, mutable=["cache"])
        last_B1D = jnp.take_along_axis(x_BLD, lengths_B[:, None, None] - 1, axis=1)
        return nn.unbox(new["cache"]), self._logits(params, last_B1D), lengths_B

    def _logits(self, params, x_B1D):
        return self.model.apply({"params": params}, x_B1D, method="logits")[:, 0]

    def _write(self, params, cache, logits_BV, lengths_B, counts_B, key):
        """Make `chunk` tokens; return the context after them and tokens [B, chunk].

        `counts_B`: new tokens of each row so far, of which the randomness is a function.
        """

        def body(carry, index):
            cache, logits_BV, lengths_B = carry
            tokens_B = self.sample(logits_BV, counts_B + index, key=key)
            batch = {
                "inputs": tokens_B[:, None],
                "segments": jnp.ones_like(tokens_B)[:, None],
                "positions": lengths_B[:, None],
            }
            x_B1D, new = self.model.apply(
                {"params": params, "cache": cache}, batch, decode=True, mutable=["cache"]
            )
            return (nn.unbox(new["cache"]), self._logits(params, x_B1D), lengths_B + 1), tokens_B

        carry, tokens = jax.lax.scan(body, (cache, logits_BV, lengths_B), jnp.arange(self.chunk))
        return *carry, tokens.swapaxes(0, 1)


def sample(
    logits_BV: jax.Array,
    counts_B: jax.Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    key: jax.Array,
) -> jax.Array:
    """Return one token id [B] for each row of logits; the randomness of row b is (key, b, counts_B[b])."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    vocab_size = logits_BV.shape[-1]
    kept = min(top_k or vocab_size, vocab_size)
    if kept < vocab_size or top_p < 1:
        logits_BV, ids_BV = jax.lax.top_k(logits_BV, kept)  # sorted, largest first
    else:
        ids_BV = jnp.broadcast_to(jnp.arange(vocab_size)[None], logits_BV.shape)
    # From the best down, so that no temperature overflows; what the model masks stays out at any.
    masked_BV = logits_BV <= MASKED_LOGIT / 2
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / max(temperature, 1e-20)
    logits_BV = jnp.where(masked_BV, FILTERED, logits_BV)
    if top_p < 1:
        probabilities = jax.nn.softmax(logits_BV, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits_BV = jnp.where(before < top_p, logits_BV, FILTERED)

    def draw(row, count, logits_V):
        return jax.random.categorical(
            jax.random.fold_in(jax.random.fold_in(key, row), count), logits_V
        )

    choice_B = jax.vmap(draw)(jnp.arange(logits_BV.shape[0]), counts_B, logits_BV)
    return jnp.take_along_axis(ids_BV, choice_B[:, None], axis=1)[:, 0].astype(jnp.int32)
