"""Take a recorded bad step again and say where it went bad: `python -m tools.replay RUN/recorder/STEP`.

On one device, in float32, layers unrolled: the part of the batch, its rows and their documents; the first
module of the forward pass with a result that is not finite; the gradients that are not. With --no_jit also
the first operation, by its name and line of source: all are run one by one. Of a spike: the rows and
parameters that stand out. Exit code 0 where the step is bad again, 1 where it is not.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lm import command, startup
from tools.recorded import Part, Recorded, Taken

_SHOWN = 4  # rows, parameters and documents of a row that are printed
_WIDTH = 100
_SAME = 0.01  # a spike is the same one where its number is off by no more: of what rounds as bfloat16 too


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

    from lm import sharding, spikes

    with sharding.use(sharding.make_mesh(sharding.Config(), jax.local_devices()[:1])):
        step = Recorded(Path(args.folder), args.dtype)
        print(f"step {step.record['step'] + 1}: {step.record['why']}")
        if step.record["environment"]["dtype"] != args.dtype:
            print(f"it ran in {step.record['environment']['dtype']}; this is {args.dtype}")
        if "standard deviations" in step.record["why"]:
            metric = next(name for name in spikes.METRICS if f"its {name} of" in step.record["why"])
            return show_spike(step, metric)
        bad = [part for part in step.parts() if not step.take(part).finite]
        if not bad:
            return show_sum(step, args.dtype)
        show_bad(step, bad, one_by_one=args.no_jit)
    return 0


def show_sum(step: Recorded, dtype: str) -> int:
    """Print what a step comes to whose parts are all finite; return 0 where it is bad as a whole."""
    import math

    whole = step.whole()
    if all(map(math.isfinite, whole.values())):
        print(f"not reproduced: in {dtype} its loss and gradients are finite here")
        return 1
    print(
        f"reproduced: loss {whole['loss']:.6g}, norm of the gradient {whole['grad_norm']:.4g}: each of the "
        f"{len(list(step.parts()))} parts is finite, only their sum is not"
    )
    return 0


def show_spike(step: Recorded, metric: str) -> int:
    """Print what stands out of a step whose `metric` is a spike; return 0 where it is one here too."""
    import numpy as np

    taken, whole = [step.take(part) for part in step.parts()], step.whole()
    same = np.isclose(whole[metric], then := step.record["metrics"][metric], rtol=_SAME)
    alone = {int(row): step.take(step.row(part, row)) for part in step.parts() for row in part.rows}
    print(
        f"{'reproduced' if same else 'not reproduced'}: {metric} {whole[metric]:.6g}, then {then:.6g}"
    )
    scored = np.array(step.batch["weights"].sum(axis=1))
    key = {"loss": lambda row: alone[row].loss, "grad_norm": lambda row: alone[row].norm}[metric]
    for row in sorted(np.flatnonzero(scored).tolist(), key=key, reverse=True)[:_SHOWN]:
        show_row(step, row, f"loss {alone[row].loss:.6g}, gradient {alone[row].norm:.4g}")
    print("largest gradients:")
    largest = {n: max(one.norms[n] for one in taken) for n in taken[0].norms}
    for name in sorted(largest, key=lambda name: -largest[name])[:_SHOWN]:
        print(f"  {name} {largest[name]:.4g}")
    return 0 if same else 1


def show_bad(step: Recorded, bad: list[Part], *, one_by_one: bool) -> None:
    """Print where the parts `bad` went bad."""
    part, count = bad[0], len(list(step.parts()))
    taken = step.take(part)
    print(f"reproduced: loss {taken.loss:.6g}, {len(taken.bad)} gradients are not finite")
    if count > 1:
        kind = "shard" if step.record["exact"] else "group" * (step.record["groups"] > 1)
        names = [(f"{kind} {p.group} " if kind else "") + f"part {p.index}" for p in bad]
        print(f"in {len(bad)} of its {count} parts: {', '.join(names[:_SHOWN])}")
    show_inputs(step)
    alone = {int(r): step.take(step.row(p, r)) for p in bad for r in p.rows}
    guilty = [row for row, one in alone.items() if not one.finite]
    for row in guilty[:_SHOWN]:
        show_row(step, row, "bad alone")
    if len(guilty) > _SHOWN:
        print(f"and {len(guilty) - _SHOWN} rows more of {len(step.batch['inputs'])}")
    if not guilty:
        print("no row is bad alone: they are together")
    else:
        part = step.row(next(p for p in bad if guilty[0] in p.rows), guilty[0])
    calls = step.forward(part)
    show_forward(calls, step.take(part))
    show_backward(calls, step.take(part))
    if one_by_one:
        show_operation(step, part)


def show_inputs(step: Recorded) -> None:
    """Print what is not finite in the state before the step, and in the batch itself."""
    import numpy as np

    from lm.stored import flatten

    for what, tree in (
        ("parameter", step.params),
        ("carry", step.carry),
        ("batch", step.batch),
    ):
        for name, x in flatten(tree).items():
            where = np.argwhere(~np.isfinite(np.asarray(x)))
            if len(where):
                places = ", ".join(str(tuple(place)) for place in where[:2].tolist())
                print(
                    f"{what} {name}: {len(where)} numbers are not finite before the step: {places}"
                )


def show_row(step: Recorded, row: int, why: str) -> None:
    """Print where a row comes from and what it says."""
    import numpy as np

    size = len(step.batch["inputs"]) // step.record["shards"]
    shard = f", shard {row // size} of {step.record['shards']}" if step.record["shards"] > 1 else ""
    known = step.record["rows"][row]
    print(f"row {row}{shard} ({why}): {known['row']}")
    for line in known["documents"][:_SHOWN]:
        print(f"  {line}")
    text = step.tokenizer.decode(np.asarray(step.batch["inputs"][row]))
    print(f"  {text!r}" if len(text) < _WIDTH else f"  {text[:_WIDTH]!r} ...")


def show_forward(calls: list[Any], taken: Taken) -> None:
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


def show_backward(calls: list[Any], taken: Taken) -> None:
    """Print the gradient that goes bad first on the way back: of the module that was called last."""
    import math

    called = [(call.path.replace("/", "."), place) for place, call in enumerate(calls)]
    # A tied embedding is called first and last. Where not all are bad it was not the last call.
    order = dict(called if len(taken.bad) == len(taken.norms) else called[::-1])

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


def show_operation(step: Recorded, part: Part) -> None:
    """Print the first operation that makes a bad number of good ones, and what makes NaN of an infinity."""
    import jax

    found = step.anatomy.bad_operations(
        jax.value_and_grad(step.loss, has_aux=True), *step.arguments(part)
    )
    if not found:
        print("operation: none makes it of finite numbers; it was there before the step")
    for what, made in zip(("operation", "the first NaN"), found, strict=False):
        print(f"{what}: {made.name} {made.shapes}\n  in {made.where}\n  at {made.source}")


if __name__ == "__main__":
    sys.exit(main())
