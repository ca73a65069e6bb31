"""What the devices can do: the table of peaks, and where cuDNN's attention is taken."""

import itertools
import math
import types

import jax
import pytest

from lm import hardware


def pretend(monkeypatch, kind, backend="gpu", capability="8.0"):
    device = types.SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * 8)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
    ],
)
def test_the_longest_name_counts(monkeypatch, kind, peak):
    pretend(monkeypatch, kind)
    assert hardware.peak_flops() == peak


@pytest.fixture
def products(monkeypatch):
    """Return what the next products shall reach, and the arguments that they were asked with."""
    rates, asked = [], []

    def measure(sizes, *, seconds, dtype=jax.numpy.float32):
        asked.append((sizes, dtype))
        return rates.pop(0)

    monkeypatch.setattr(hardware, "measure_matmul_flops", measure)
    monkeypatch.setattr(hardware, "_seen", {})
    monkeypatch.setattr(hardware, "_timed_at", -math.inf)
    return rates, asked


def test_an_unknown_accelerator_is_measured_once_in_its_own_type_on_one_device(
    monkeypatch, products
):
    pretend(monkeypatch, "NVIDIA GeForce RTX 4090")
    rates, asked = products
    rates += [160e12]
    assert hardware.peak_flops() == 160e12
    hardware.measure_again()
    assert hardware.peak_flops() == 160e12
    assert asked == [((8192,), jax.numpy.bfloat16)]


def test_the_peak_is_the_most_that_was_seen_and_simulated_devices_share_it(monkeypatch, products):
    pretend(monkeypatch, "cpu", backend="cpu")
    products[0].extend([400e9, 800e9, 80e9])
    assert hardware.peak_flops() == 50e9
    assert hardware.peak_flops(60e9) == hardware.peak_flops(10e9) == 60e9
    hardware.measure_again()
    assert hardware.peak_flops() == 100e9
    hardware.measure_again()
    assert len(products[0]) == 1, "it has only just been measured"
    hardware.measure_again(every=0.0)
    assert hardware.peak_flops() == 100e9 and products[0] == []


def test_a_data_sheet_is_what_it_is(monkeypatch, products):
    pretend(monkeypatch, "NVIDIA H100 PCIe")
    hardware.measure_again()
    assert hardware.peak_flops(9e15) == 756e12 and products[1] == []
    assert hardware.utilisation(1512e12, surely=1400e12) == 2, "an error that is to be seen"


def test_utilisation_of_a_measured_peak_is_at_most_one(monkeypatch, products):
    pretend(monkeypatch, "cpu", backend="cpu")
    products[0].extend([800e9])
    assert hardware.utilisation(50e9, surely=45e9) == 0.5
    assert hardware.utilisation(130e9, surely=0.0) == 1, "a step that had run before"
    assert hardware.utilisation(50e9, surely=45e9) == 0.5, "which is no peak"
    assert hardware.utilisation(130e9, surely=125e9) == 1
    assert hardware.utilisation(50e9, surely=45e9) == 0.4


def test_the_best_of_many_products_counts(monkeypatch):
    """One that takes long, as on a machine that others use too, changes nothing."""
    now, taken = [0.0], itertools.cycle([0.5, 0.125, 0.25])
    fake = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(hardware, "time", fake)

    class Product:
        def block_until_ready(self):
            now[0] += next(taken)

    monkeypatch.setattr(hardware, "_multiply", lambda a, b: Product())
    assert hardware.measure_matmul_flops((512,), seconds=0.0) == 2 * 512**3 / 0.125
    assert hardware.measure_matmul_flops((512,), seconds=2.0) == 2 * 512**3 / 0.125
    assert now[0] < 4


@pytest.mark.parametrize(
    ("backend", "capability", "has"),
    [("gpu", "8.0", True), ("gpu", "9.0", True), ("gpu", "7.5", False), ("cpu", "0.0", False)],
)
def test_flash_attention_needs_ampere(monkeypatch, backend, capability, has):
    pretend(monkeypatch, "a device", backend=backend, capability=capability)
    assert hardware.has_flash_attention() == has
