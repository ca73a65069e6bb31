"""A step that a run recorded as bad, on one device: its parts, what each comes to, its calls of modules."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of the batch that one gradient is taken of: a micro-batch, of one of the groups there are."""

    group: int
    index: int
    rows: Any  # int [R], of the whole batch


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a part comes to: its loss in nats a token, whose gradients are not finite, the norms of all."""

    loss: float
    bad: tuple[str, ...]
    norms: dict[str, float]

    @property
    def finite(self) -> bool:
        """Whether loss, gradients and the norm of all of them are."""
        import math

        return math.isfinite(self.loss) and not self.bad and math.isfinite(self.norm)

    @property
    def norm(self) -> float:
        """The norm of all gradients, as float32 has it: beyond 1.8e19 infinite."""
        import numpy as np

        with np.errstate(over="ignore"):
            return float(np.sqrt(np.square(np.array([*self.norms.values()], np.float32)).sum()))


class Recorded:
    """A bad step as it was recorded, with its model on one device."""

    def __init__(self, folder: Path, dtype: str):
        from lm import anatomy, manifests, recorder, step
        from lm.data import tokenizers
        from lm.receipt import read_json

        if not (folder / recorder.FILE).is_file():
            found = sorted(str(path.parent) for path in folder.rglob(recorder.FILE))
            raise ConfigError(
                f"{folder}: no {recorder.FILE} there; "
                + (
                    f"name one of {', '.join(found)}"
                    if found
                    else "name a folder of a run's recorder/"
                )
            )
        self.record = read_json(folder / recorder.FILE, sealed=True)
        for name, value in (("exact", 0), ("apart", self.record["groups"] > 1)):
            self.record.setdefault(name, value)  # of an older version
        number = self.record["step"]
        if problem := manifests.problem(folder / "checkpoints", number):
            raise ConfigError(f"{folder}: damaged: {problem}")
        self.tokenizer = tokenizers.load(folder / "tokenizer")
        self.model = _model(folder, dtype)
        corpora = tuple(self.record["objective"].pop("corpora"))
        self.objective = step.Objective(**self.record["objective"], corpora=corpora)
        self.batch, self.params, self.carry = _arrays(folder, number, self.model, self.record)
        self.anatomy = anatomy
        self._jitted: dict[int, Any] = {}

    def parts(self) -> Iterator[Part]:
        """Yield the parts of the batch in the order in which their gradients are summed."""
        import numpy as np

        groups, count = self.record["exact"] or self.record["groups"], self.record["accumulate"]
        for group, rows in enumerate(np.split(np.arange(len(self.batch["inputs"])), groups)):
            for index in range(count):
                yield Part(group, index, rows[index::count])

    def loss(self, params: Any, batch: Any, carry: Any, rng: Any, whole: Any) -> tuple[Any, Any]:
        """Return (what a part adds to the objective, its sums), as the step does."""
        from lm import step

        total, (_, sown, sums) = step.forward(
            self.model, {"params": params, **carry}, batch, self.objective, rngs={"dropout": rng}
        )
        extra = sum((value / weight).sum() for value, weight in sown.values())
        num_parts = self.record["accumulate"] * (self.record["exact"] or 1)
        return total / whole + extra / num_parts, sums

    def arguments(self, part: Part) -> tuple[Any, ...]:
        """Return the arguments of `loss` for a part, or for some of its rows."""
        import jax
        import jax.numpy as jnp

        rng = jax.random.fold_in(jax.random.key(self.record["seed"]), self.record["step"])
        if self.record["apart"] or self.record["exact"]:
            rng = jax.random.fold_in(rng, part.group)
        if self.record["accumulate"] > 1:
            rng = jax.random.fold_in(rng, part.index)
        params = self.params
        if self.record["apart"]:
            params = jax.tree.map(lambda x: x[part.group], params)
        batch, carry = jax.tree.map(lambda x: x[part.rows], (self.batch, self.carry))
        size = len(self.batch["inputs"]) // self.record["groups"]
        group = 0 if self.record["exact"] else part.group  # shards are of one batch
        weights = self.batch["weights"][group * size :][:size]
        whole = jnp.where(
            jnp.isfinite(weights), weights, 0
        ).sum()  # else every part were bad of one
        return params, batch, carry, rng, jnp.maximum(whole, 1e-9)

    def take(self, part: Part) -> Taken:
        """Return what a part comes to."""
        import jax.numpy as jnp

        from lm.stored import flatten

        (value, sums), grads = self._gradients(part)
        total, weight = sums["loss"]
        # A part whose weights are not finite is bad, though nothing of it may be scored.
        loss = float(total / weight) if weight != 0 else float(value)
        norms = {name: float(jnp.linalg.norm(x.ravel())) for name, x in flatten(grads).items()}
        bad = [name for name, x in flatten(grads).items() if not jnp.isfinite(x).all()]
        return Taken(loss, tuple(bad), norms)

    def whole(self) -> dict[str, float]:
        """Return loss and grad_norm of the step as it reported them: the norm of groups is their mean."""
        import jax
        import jax.numpy as jnp
        import numpy as np
        import optax

        scored: list[Any] = []
        summed: dict[int, Any] = {}
        for part in self.parts():
            (_, sums), grads = self._gradients(part)
            scored.append(sums["loss"])
            group = 0 if self.record["exact"] else part.group
            old = summed.get(group)
            summed[group] = grads if old is None else jax.tree.map(jnp.add, old, grads)
        total, weight = np.array(scored).sum(axis=0)
        norms = [float(optax.tree.norm(grads)) for grads in summed.values()]
        return {"loss": float(total / weight), "grad_norm": float(np.mean(norms))}

    def _gradients(self, part: Part) -> Any:
        """Return ((what a part adds to the objective, its sums), its gradients)."""
        import jax

        if len(part.rows) not in self._jitted:
            self._jitted[len(part.rows)] = jax.jit(jax.value_and_grad(self.loss, has_aux=True))
        return self._jitted[len(part.rows)](*self.arguments(part))

    def row(self, part: Part, row: int) -> Part:
        """Return one row of a part as a part."""
        return dataclasses.replace(part, rows=part.rows[part.rows == row])

    def forward(self, part: Part) -> list[Any]:
        """Return the calls of modules on the way to the logits of a part, which are made whole."""
        params, batch, carry, rng, _ = self.arguments(part)
        options: dict[str, Any] = {"train": True, "rngs": {"dropout": rng}}
        mutable = ["losses", "reports", *carry]

        def run():
            x_BLD, _ = self.model.apply(
                {"params": params, **carry}, batch, mutable=mutable, **options
            )
            self.model.apply({"params": params}, x_BLD, method="logits")

        return self.anatomy.module_calls(run)


def _model(folder: Path, dtype: str) -> Any:
    """Return the recorded run's model: computed in `dtype`, its layers one by one."""
    from lm import checkpoint, models
    from lm import config as config_lib

    config = checkpoint.read_config(folder)
    cls = models.config_class(config.model.name)
    cfg: Any = config_lib.freeze(cls, config.model, where="model")
    plain = {"dtype": dtype, "matmul_dtype": "", "scan": False, "remat": "none", "kernel": "xla"}
    for field in dataclasses.fields(cls):
        if field.name in ("microbatches", "stage_repeats"):
            plain[field.name] = field.default
    if getattr(cfg, "scan", False) and getattr(cfg, "dropout", 0.0):
        print("its layers were scanned, and dropout has other masks in layers one by one")
    names = {field.name for field in dataclasses.fields(cls)}
    return models.build(dataclasses.replace(cfg, **{n: v for n, v in plain.items() if n in names}))


def _arrays(folder: Path, number: int, model: Any, record: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return (batch, parameters, carry) before the step, on one device; of groups each one's parameters."""
    import jax
    import numpy as np
    from flax import linen as nn

    from lm import checkpoint, manifests, placement, step
    from lm.stored import flatten, unflatten

    folder = (folder / "checkpoints").absolute()
    stored = (manifests.read(folder, number) or {})["arrays"]
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    groups = (record["groups"],) if record["apart"] else ()

    def described(x, lead=()):
        return jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=place)

    shapes = jax.tree.map(lambda x: described(x, groups), step.parameter_axes(model)[1])
    tree: dict[str, Any] = {"local": {"params": shapes}} if groups else {"params": shapes}
    names = [name for name in stored if name.startswith("batch.")]
    tree["batch"] = {
        name.removeprefix("batch."): jax.ShapeDtypeStruct(
            tuple(stored[name][0]), stored[name][1], sharding=place
        )
        for name in names
    }
    rows = tree["batch"]["inputs"].shape[0]
    tree["carry"] = {}
    if any(name.startswith("carry.") for name in stored):
        carry = jax.eval_shape(functools.partial(model.init_carry, rows))
        tree["carry"] = {"carry": jax.tree.map(described, nn.unbox(carry))}
    found = unflatten(tree, checkpoint.restore(folder, number, flatten(tree)))

    def in_order(x):
        if x.ndim < 2 or record["length_parts"] == 1:
            return x
        return x[:, np.argsort(placement.columns(x.shape[1], record["length_parts"]))]

    params = found["local"]["params"] if groups else found["params"]
    return {name: in_order(x) for name, x in found["batch"].items()}, params, found["carry"]
