"""Tests of the table of hardware: figures agree with units and clocks, and names find their device."""

from __future__ import annotations

import pytest

from stagetrace.analysis.hardware import DEVICES, Device, match

ARITHMETIC = {"fp32", "tf32", "bf16", "fp16", "fp8", "fp6", "fp4", "int8", "int4"}
BY_NAME = {device.name: device for device in DEVICES}

# Units, dense 16-bit operations of one in a clock, and the highest clock in GHz, of the vendors' architecture papers:
# another way to the same peak, that a figure with sparsity would miss by a factor of two.
UNITS = {
    "A100 SXM 80 GB": (108, 2048, 1.410),
    "A100 PCIe 40 GB": (108, 2048, 1.410),
    "H100 SXM": (132, 4096, 1.830),
    "H200 SXM": (132, 4096, 1.830),
    "H100 PCIe": (114, 4096, 1.620),
    "L4": (58, 1024, 2.040),
    "L40S": (142, 1024, 2.490),
    "RTX PRO 6000 Blackwell Workstation Edition": (188, 1024, 2.617),
    "MI210": (104, 1024, 1.700),
    "MI250": (104, 1024, 1.700),
    "MI250X": (110, 1024, 1.700),
    "MI300A": (228, 2048, 2.100),
    "MI300X": (304, 2048, 2.100),
    "MI325X": (304, 2048, 2.100),
    "MI350X": (256, 4096, 2.200),
    "MI355X": (256, 4096, 2.400),
}


@pytest.mark.parametrize("name", UNITS)
def test_peaks_are_dense(name: str):
    units, operations, clock = UNITS[name]
    assert BY_NAME[name].peaks["bf16"] == pytest.approx(units * operations * clock * 1e9, rel=0.005)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_device_is_whole(device: Device):
    assert set(device.peaks) <= ARITHMETIC and device.peaks["bf16"] == device.peaks["fp16"]
    assert all(peak > 0 for peak in device.peaks.values())
    assert device.memory is not None and 20e9 < device.memory < 300e9
    assert device.bandwidth is not None and 0.2e12 < device.bandwidth <= 8e12
    assert bool(device.link) == (device.link_bandwidth is not None)
    for figure in (*device.peaks, "memory", "bandwidth", "link_bandwidth"):
        source = device.source_of(figure)
        assert source.title and source.vendor and 2019 <= source.year <= 2026
    assert set(device.others) <= {*device.peaks, "memory", "bandwidth", "link_bandwidth"}


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_half_the_bits_are_at_most_twice_as_fast(device: Device):
    """A dense figure beside one with sparsity would be four times as fast; Blackwell Ultra's fp4 is three times fp8."""
    peaks = device.peaks
    for wide, narrow in (("tf32", "bf16"), ("bf16", "fp8"), ("bf16", "int8"), ("fp8", "fp4"), ("int8", "int4")):
        if wide in peaks and narrow in peaks and (device.name, narrow) != ("GB300", "int8"):  # which is cut there
            assert 0.98 <= peaks[narrow] / peaks[wide] <= (3.01 if narrow == "fp4" else 2.05), (wide, narrow)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell Server Edition"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI325 OAM", "MI325X"),
    ],
)
def test_names_find_their_device(name: str, device: str):
    found = match(name)
    assert found.device is BY_NAME[device] and str(BY_NAME[device].source) in found.answer


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_name_finds_its_device(device: Device):
    for name in device.names:
        assert match(name, device.multiprocessors).device is device


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "is a part of a device"),
        ("AMD Instinct MI250X / MI250", "is MI250 or MI250X, and nothing says which"),
        ("NVIDIA H100 96GB HBM3e", "is not in the table of data sheets"),
        ("NVIDIA H1000", "is not in the table of data sheets"),
        ("H100", "is not in the table of data sheets"),
        ("", "A device without a name is not in the table"),
    ],
)
def test_other_devices_are_not_guessed(name: str, said: str):
    found = match(name)
    assert found.device is None
    assert said in found.answer and "What it can do is not known here" in found.answer


def test_multiprocessors_tell_devices_of_one_name_apart():
    assert match("AMD Instinct MI250X / MI250", 104).device is BY_NAME["MI250"]
    assert match("AMD Instinct MI250X / MI250", 110).device is BY_NAME["MI250X"]
    assert match("AMD Instinct MI250X / MI250", 7).device is None
