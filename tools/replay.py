"""Take a recorded bad step again and say where it went bad: `python -m tools.replay RUN/recorder/STEP`.

On one device, in float32, layers unrolled: the part of the batch, its rows and their documents; the first
module of the forward pass with a result that is not finite; the gradients that are not. With --no_jit also
the first operation, by its name and line of source: all are run one by one. Of a spike: the rows and
parameters that stand out. Exit code 0 where the step is bad again, 1 where it is not.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm import command, startup
from lm.config import ConfigError

_SHOWN = 4  # rows, parameters and documents of a row that are printed
_WIDTH = 100


def main(argv: list[str] | None = None) -> int:
    """Read the flags, replay, return the exit code."""
    parser = command.Parser(
        prog="python -m tools.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="a folder of a run's recorder/")
    parser.add_argument("--no_jit", action="store_true", help="name the first bad operation too")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    args = parser.parse_args(argv)
    return command.exit_on_user_error(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> int:
    startup.prepare()
    import jax

    from lm import sharding

    with sharding.use(sharding.make_mesh(sharding.Config(), jax.local_devices()[:1])):
        step = Recorded(Path(args.folder), args.dtype)
        print(f"step {step.record['step'] + 1}: {step.record['why']}")
        if step.record["environment"]["dtype"] != args.dtype:
            print(f"it ran in {step.record['environment']['dtype']}; this is {args.dtype}")
        if "standard deviations" in step.record["why"]:
            return step.show_spike()
        bad = [part for part in step.parts() if not step.take(part).finite]
        if not bad:
            print(f"not reproduced: in {args.dtype} its loss and gradients are finite here")
            return 1
        step.show_bad(bad, one_by_one=args.no_jit)
    return 0


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
        self.record = read_json(folder / recorder.FILE)
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
        import jax
        import jax.numpy as jnp

        from lm.stored import flatten

        if len(part.rows) not in self._jitted:
            self._jitted[len(part.rows)] = jax.jit(jax.value_and_grad(self.loss, has_aux=True))
        (value, sums), grads = self._jitted[len(part.rows)](*self.arguments(part))
        total, weight = sums["loss"]
        # A part whose weights are not finite is bad, though nothing of it may be scored.
        loss = float(total / weight) if weight != 0 else float(value)
        norms = {name: float(jnp.linalg.norm(x.ravel())) for name, x in flatten(grads).items()}
        bad = [name for name, x in flatten(grads).items() if not jnp.isfinite(x).all()]
        return Taken(loss, tuple(bad), norms)

    def row(self, part: Part, row: int) -> Part:
        """Return one row of a part as a part."""
        return dataclasses.replace(part, rows=part.rows[part.rows == row])

    def show_spike(self) -> int:
        """Print what stands out of a step that is a spike; return 0 where it is one here too."""
        import numpy as np

        taken = [self.take(part) for part in self.parts()]
        alone = {
            int(row): self.take(self.row(part, row)) for part in self.parts() for row in part.rows
        }
        scored = np.array(self.batch["weights"].sum(axis=1))
        losses = np.array([alone[row].loss for row in sorted(alone)])
        loss, then = float(np.average(losses, weights=scored)), self.record["metrics"]["loss"]
        same = bool(np.isclose(loss, then, rtol=0.01))
        print(f"{'reproduced' if same else 'not reproduced'}: loss {loss:.6g}, then {then:.6g}")
        for row in np.argsort(-np.where(scored > 0, losses, -np.inf))[:_SHOWN].tolist():
            self.show_row(row, f"loss {losses[row]:.6g}, gradient {alone[row].norm:.4g}")
        print("largest gradients:")
        largest = {n: max(one.norms[n] for one in taken) for n in taken[0].norms}
        for name in sorted(largest, key=lambda name: -largest[name])[:_SHOWN]:
            print(f"  {name} {largest[name]:.4g}")
        return 0 if same else 1

    def show_bad(self, bad: list[Part], *, one_by_one: bool) -> None:
        """Print where the parts `bad` went bad."""
        part, count = bad[0], len(list(self.parts()))
        taken = self.take(part)
        print(f"reproduced: loss {taken.loss:.6g}, {len(taken.bad)} gradients are not finite")
        if count > 1:
            kind = "shard" if self.record["exact"] else "group" * (self.record["groups"] > 1)
            names = [(f"{kind} {p.group} " if kind else "") + f"part {p.index}" for p in bad]
            print(f"in {len(bad)} of its {count} parts: {', '.join(names[:_SHOWN])}")
        self.show_inputs()
        alone = {int(r): self.take(self.row(p, r)) for p in bad for r in p.rows}
        guilty = [row for row, one in alone.items() if not one.finite]
        for row in guilty[:_SHOWN]:
            self.show_row(row, "bad alone")
        if len(guilty) > _SHOWN:
            print(f"and {len(guilty) - _SHOWN} rows more of {len(self.batch['inputs'])}")
        if not guilty:
            print("no row is bad alone: they are together")
        else:
            part = self.row(next(p for p in bad if guilty[0] in p.rows), guilty[0])
        calls = self.forward(part)
        self.show_forward(calls, self.take(part))
        self.show_backward(calls, self.take(part))
        if one_by_one:
            self.show_operation(part)

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

    def show_inputs(self) -> None:
        """Print what is not finite in the state before the step, and in the batch itself."""
        import numpy as np

        from lm.stored import flatten

        for what, tree in (
            ("parameter", self.params),
            ("carry", self.carry),
            ("batch", self.batch),
        ):
            for name, x in flatten(tree).items():
                where = np.argwhere(~np.isfinite(np.asarray(x)))
                if len(where):
                    places = ", ".join(str(tuple(place)) for place in where[:2].tolist())
                    print(
                        f"{what} {name}: {len(where)} numbers are not finite before the step: {places}"
                    )

    def show_row(self, row: int, why: str) -> None:
        """Print where a row comes from and what it says."""
        import numpy as np

        size = len(self.batch["inputs"]) // self.record["shards"]
        shard = (
            f", shard {row // size} of {self.record['shards']}" if self.record["shards"] > 1 else ""
        )
        known = self.record["rows"][row]
        print(f"row {row}{shard} ({why}): {known['row']}")
        for line in known["documents"][:_SHOWN]:
            print(f"  {line}")
        text = self.tokenizer.decode(np.asarray(self.batch["inputs"][row]))
        print(f"  {text!r}" if len(text) < _WIDTH else f"  {text[:_WIDTH]!r} ...")

    def show_forward(self, calls: list[Any], taken: Taken) -> None:
        """Print the first module of the forward pass with a bad result."""
        import math

        first = next((call for call in calls if call.bad), None)
        if first:
            print(
                f"forward: {first.path or 'the model'} ({first.method}) is the first with numbers that are "
                f"not finite, {first.bad} of {first.size}"
            )
        elif not math.isfinite(taken.loss):
            print(
                "forward: every module's result is finite; the loss (losses.cross_entropy) is the first not"
            )
        else:
            print(f"forward: finite, loss {taken.loss:.6g}")

    def show_backward(self, calls: list[Any], taken: Taken) -> None:
        """Print the gradient that goes bad first on the way back: of the module that was called last."""
        import math

        order = {call.path.replace("/", "."): place for place, call in enumerate(calls)}

        def place(name: str) -> int:
            prefixes = (name.rsplit(".", size)[0] for size in range(1, name.count(".") + 1))
            return next((order[prefix] for prefix in prefixes if prefix in order), -1)

        count = f"{len(taken.bad)} of {len(taken.norms)} gradients are not finite"
        if taken.bad and not math.isfinite(taken.loss):
            print(f"backward: {count}, as the loss is not")
        elif taken.bad:
            print(f"backward: {count}, that of {max(taken.bad, key=place)} first")
        elif not taken.finite:
            first = max(taken.norms, key=taken.norms.__getitem__)
            print(
                f"backward: the norm overflows; the largest gradient is that of {first}, "
                f"{taken.norms[first]:.4g}"
            )

    def show_operation(self, part: Part) -> None:
        """Print the first operation that makes a bad number of good ones."""
        import jax

        found = self.anatomy.first_bad_operation(
            jax.value_and_grad(self.loss, has_aux=True), *self.arguments(part)
        )
        if found is None:
            print("operation: none makes it of finite numbers; it was there before the step")
        else:
            print(
                f"operation: {found.name} {found.shapes}\n  in {found.where}\n  at {found.source}"
            )


def _model(folder: Path, dtype: str) -> Any:
    """Return the recorded run's model: computed in `dtype`, its layers one by one."""
    from lm import checkpoint, models
    from lm import config as config_lib

    config = checkpoint.read_config(folder)
    cls = models.config_class(config.model.name)
    cfg: Any = config_lib.freeze(cls, config.model, where="model")
    plain = {"dtype": dtype, "matmul_dtype": "", "scan": False, "remat": "none"}
    for field in dataclasses.fields(cls):
        if field.name in ("microbatches", "stage_repeats"):
            plain[field.name] = field.default
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


if __name__ == "__main__":
    sys.exit(main())
