"""Points are the ones meant, and their names and assignments read back."""

import pytest

from lm import sweep, value_types
from lm.value_types import Duration


def test_grid_is_every_combination_last_axis_fastest():
    points = sweep.grid({"a.x": [1, 2], "a.y": (3, 4)}, {"seed": range(2)})
    assert [tuple(point.values()) for point in points] == [
        (x, y, seed) for x in (1, 2) for y in (3, 4) for seed in (0, 1)
    ]
    assert list(points[0]) == ["a.x", "a.y", "seed"]
    assert sweep.grid() == [{}]


def test_an_axis_may_be_read_once():
    found = sweep.grid({"optim.peak_lr": map(float, (1, 2)), "seed": iter([0])})
    assert [point["optim.peak_lr"] for point in found] == [1.0, 2.0]


def test_axes_of_a_grid_may_be_points():
    sizes = sweep.zipped({"model.num_layers": [2, 4], "model.model_dim": [128, 256]})
    assert sizes == [
        {"model.num_layers": 2, "model.model_dim": 128},
        {"model.num_layers": 4, "model.model_dim": 256},
    ]
    points = sweep.chain(sweep.grid(sizes, {"seed": [0, 1]}), [{"seed": 7}])
    assert points == [size | {"seed": seed} for size in sizes for seed in (0, 1)] + [{"seed": 7}]
    assert sizes[0] == {"model.num_layers": 2, "model.model_dim": 128}  # unchanged


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: sweep.grid({"a": []}),
        lambda: sweep.grid({"a": "adamw"}),
        lambda: sweep.grid({"a": 3}),
        lambda: sweep.grid({"a": [1]}, [{"a": 2}]),
        lambda: sweep.zipped({"a": [1, 2], "b": [1]}),
        lambda: sweep.zipped({"a": [1], "b": "x"}),
    ],
)
def test_mistakes_name_the_field(wrong):
    with pytest.raises(ValueError, match=r"^[ab][ :=]"):
        wrong()


def test_assignments_read_back_as_the_values():
    values = [0.0003, 1e-8, 3, True, "2 epochs", ("a", "b,c"), (("(x|y)", 0.5),), ()]
    hints = [float, float, int, bool, Duration]
    hints += [tuple[str, ...], tuple[tuple[str, float], ...], tuple[str, ...]]
    for value, hint in zip(values, hints, strict=True):
        (assignment,) = sweep.assignments({"a.x": value})
        key, _, text = assignment.partition("=")
        assert key == "a.x"
        assert value_types.from_text(text, hint) == value


def test_names_are_short_and_folder_safe_and_tell_points_apart():
    assert sweep.name({"optim.peak_lr": 0.001, "seed": 0}) == "peak_lr=0.001,seed=0"
    assert sweep.name({"data.name": "x", "model.name": "y"}) == "data.name=x,model.name=y"
    assert sweep.name({}) == "default"
    awkward = ["a/b", "a\\b", "../..", "a b", "ä", "a\nb", "x" * 300, "x" * 299, ".", ""]
    names = [sweep.name({"data.path": value}) for value in awkward]
    assert len(set(names)) == len(awkward)
    for name in names:
        assert len(name) < 200
        assert not set(name) & set("/\\ \n:")
        assert not name.startswith(".")
        assert name == name.encode("ascii").decode()


def test_a_names_point_does_not_depend_on_the_others():
    small = sweep.grid({"optim.peak_lr": [1e-3]})
    large = sweep.grid({"optim.peak_lr": [1e-3, 1e-4]})
    assert sweep.name(small[0]) == sweep.name(large[0])
