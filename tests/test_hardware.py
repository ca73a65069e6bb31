"""What the devices can do: the table of peaks, and where cuDNN's attention is taken."""

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


def test_an_unknown_accelerator_is_measured_in_its_own_type_on_one_device(monkeypatch):
    pretend(monkeypatch, "NVIDIA GeForce RTX 4090")
    asked = []
    monkeypatch.setattr(
        hardware, "measure_matmul_flops", lambda size, dtype: asked.append((size, dtype)) or 160e12
    )
    assert hardware.peak_flops() == 160e12
    assert asked == [(8192, jax.numpy.bfloat16)]


def test_simulated_devices_share_what_the_cores_can_do(monkeypatch):
    pretend(monkeypatch, "cpu", backend="cpu")
    monkeypatch.setattr(hardware, "measure_matmul_flops", lambda: 800e9)
    assert hardware.peak_flops() == 100e9


@pytest.mark.parametrize(
    ("backend", "capability", "has"),
    [("gpu", "8.0", True), ("gpu", "9.0", True), ("gpu", "7.5", False), ("cpu", "0.0", False)],
)
def test_flash_attention_needs_ampere(monkeypatch, backend, capability, has):
    pretend(monkeypatch, "a device", backend=backend, capability=capability)
    assert hardware.has_flash_attention() == has
