"""What devices can do at most by their data sheets: the ceilings where none were measured. Data, and finding a device.

Peaks are dense, never those with structured sparsity: figures that vendors publish with it stand here as published,
marked as such, and are halved when read. What is not known is left out, never guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True)
class Source:
    """A document."""

    title: str
    vendor: str
    year: int

    def __str__(self) -> str:
        """As a reference."""
        return f"{self.vendor}, {self.title}, {self.year}"


@dataclass(frozen=True)
class Device:
    """One device as torch counts them: of a card with two dies that are devices of their own, one die."""

    name: str
    names: tuple[str, ...]  # that torch.cuda.get_device_name() gives
    source: Source  # of all figures but those in `others`
    peaks: dict[str, float]  # dense operations per second, by arithmetic: fp32 tf32 bf16 fp16 fp8 fp6 fp4 int8 int4
    memory: float | None  # bytes
    bandwidth: float | None  # of memory, bytes per second
    link: str  # to other devices of the node; empty where not known
    link_bandwidth: float | None  # bytes per second and direction, all links of the device together
    multiprocessors: int | None = None  # where the name alone does not tell it from another
    notes: str = ""
    others: dict[str, Source] = field(default_factory=dict)  # by figure: memory, bandwidth, link_bandwidth, or a peak

    def source_of(self, figure: str) -> Source:
        """Where a figure is from: memory, bandwidth, link_bandwidth or a key of peaks."""
        return self.others.get(figure, self.source)


@dataclass(frozen=True)
class Match:
    """The device of a name, and a sentence that says which figures hold, or what to do when there are none."""

    device: Device | None
    answer: str


def _dense(**tera: float) -> dict[str, float]:
    """Peaks published without sparsity, in tera-operations per second."""
    return {name: value * TERA for name, value in tera.items()}


def _halved(**tera: float) -> dict[str, float]:
    """Peaks published with 2:4 structured sparsity, which doubles them, in tera-operations per second."""
    return {name: value * TERA / 2 for name, value in tera.items()}


A100 = Source("NVIDIA A100 Tensor Core GPU Datasheet", "NVIDIA", 2021)
AMPERE = Source("NVIDIA A100 Tensor Core GPU Architecture (whitepaper)", "NVIDIA", 2020)
H100 = Source("NVIDIA H100 Tensor Core GPU Datasheet", "NVIDIA", 2024)
H100_PCIE = Source("NVIDIA H100 PCIe GPU Product Brief", "NVIDIA", 2022)
H200 = Source("NVIDIA H200 Tensor Core GPU Datasheet", "NVIDIA", 2024)
L4 = Source("NVIDIA L4 Tensor Core GPU Datasheet", "NVIDIA", 2023)
L40S = Source("NVIDIA L40S GPU Datasheet", "NVIDIA", 2023)
BLACKWELL = Source("NVIDIA Blackwell Architecture Technical Brief", "NVIDIA", 2024)
DGX_B200 = Source("NVIDIA DGX B200 Datasheet", "NVIDIA", 2024)
GB200 = Source("NVIDIA GB200 NVL72 (product page, specifications)", "NVIDIA", 2025)
DGX_B300 = Source("NVIDIA DGX B300 Datasheet", "NVIDIA", 2025)
ULTRA = Source("NVIDIA Blackwell Ultra Datasheet", "NVIDIA", 2025)
GB300 = Source("NVIDIA GB300 NVL72 (product page, specifications)", "NVIDIA", 2025)
RTX_PRO = Source("NVIDIA RTX Blackwell PRO GPU Architecture (whitepaper)", "NVIDIA", 2025)
RTX_PRO_SERVER = Source("NVIDIA RTX PRO 6000 Blackwell Server Edition Datasheet", "NVIDIA", 2025)
RTX_PRO_MAX_Q = Source("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition Datasheet", "NVIDIA", 2025)
MI200 = Source("AMD Instinct MI200 Series Accelerator Data Sheet", "AMD", 2022)
MI210 = Source("AMD Instinct MI210 Accelerator Data Sheet", "AMD", 2022)
MI300A = Source("AMD Instinct MI300A APU Data Sheet", "AMD", 2023)
MI300X = Source("AMD Instinct MI300X Accelerator Data Sheet", "AMD", 2023)
MI325X = Source("AMD Instinct MI325X Accelerator Data Sheet", "AMD", 2024)
MI350X = Source("AMD Instinct MI350X GPU Data Sheet", "AMD", 2025)
MI355X = Source("AMD Instinct MI355X GPU Data Sheet", "AMD", 2025)
PCI = Source("PCI Express Base Specification 5.0, x16, before encoding of packets", "PCI-SIG", 2019)

_PCIE4, _PCIE5 = 31.5 * GIGA, 63.0 * GIGA  # 16 lanes of 16 or 32 GT/s, 128b/130b encoded
_NVLINK3, _NVLINK4, _NVLINK5 = 300 * GIGA, 450 * GIGA, 900 * GIGA  # half of 600, 900 and 1800 GB/s in both directions
_HALF_CARD = "One of the card's two dies, which are devices of their own: half of the card's figures."

_A100_PEAKS = _dense(fp32=19.5, tf32=156, bf16=312, fp16=312, int8=624, int4=1248)
_A100_SXM = Device(
    "A100 SXM 80 GB",
    ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
    A100,
    _A100_PEAKS,
    80 * GIGA,
    2039 * GIGA,
    "NVLink 3",
    _NVLINK3,
    others={"int4": AMPERE},
)
_A100_PCIE = replace(
    _A100_SXM,
    name="A100 PCIe 80 GB",
    names=("NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-80GB"),
    bandwidth=1935 * GIGA,
    notes="NVLink only between two cards with a bridge.",
)
_H100_SXM = Device(
    "H100 SXM",
    ("NVIDIA H100 80GB HBM3",),
    H100,
    _dense(fp32=67) | _halved(tf32=989, bf16=1979, fp16=1979, fp8=3958, int8=3958),
    80 * GIGA,
    3350 * GIGA,
    "NVLink 4",
    _NVLINK4,
)
_H100_NVL = replace(
    _H100_SXM,
    name="H100 NVL",
    names=("NVIDIA H100 NVL",),
    peaks=_dense(fp32=60) | _halved(tf32=835, bf16=1671, fp16=1671, fp8=3341, int8=3341),
    memory=94 * GIGA,
    bandwidth=3900 * GIGA,
    link_bandwidth=_NVLINK3,
    notes="NVLink only between two cards with a bridge, 600 GB/s in both directions.",
)
_B200 = Device(
    "B200",
    ("NVIDIA B200",),
    BLACKWELL,
    _dense(fp32=80, tf32=1100, bf16=2250, fp16=2250, fp8=4500, fp6=4500, fp4=9000, int8=4500),
    180 * GIGA,
    8000 * GIGA,
    "NVLink 5",
    _NVLINK5,
    notes="HGX and DGX. Memory that programs can use: the chip has 192 GB.",
    others={"memory": DGX_B200, "bandwidth": DGX_B200},
)
_B300 = Device(
    "B300",
    ("NVIDIA B300 SXM6 AC", "NVIDIA B300"),
    DGX_B300,
    _halved(bf16=4500, fp16=4500, fp8=9000) | _dense(fp4=13500),
    270 * GIGA,
    7700 * GIGA,
    "NVLink 5",
    _NVLINK5,
    notes="An eighth of the DGX's 108 PFLOPS dense fp4. NVIDIA's figures for int8 differ and are left out.",
    others={"bf16": ULTRA, "fp16": ULTRA, "fp8": ULTRA, "memory": ULTRA, "bandwidth": ULTRA},
)
# The chip's tensor cores do 4 times its fp32 rate in 16 bits: 503.8 to 126.0 TFLOPS in the whitepaper.
_RTX_PRO_RATIOS = {"tf32": 2, "bf16": 4, "fp16": 4, "fp8": 8, "int8": 8, "fp4": 16}
_RTX_PRO = Device(
    "RTX PRO 6000 Blackwell Workstation Edition",
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition",),
    RTX_PRO,
    _dense(fp32=126.0, tf32=251.9, bf16=503.8, fp16=503.8, fp8=1007.6, int8=1007.6, fp4=2015.2),
    96 * GIGA,
    1792 * GIGA,
    "PCIe 5.0 x16",
    _PCIE5,
    others={"link_bandwidth": PCI},
)
_MI300X_PEAKS = _dense(fp32=163.4, tf32=653.7, bf16=1307.4, fp16=1307.4, fp8=2614.9, int8=2614.9)
_MI300X = Device(
    "MI300X",
    ("AMD Instinct MI300X", "AMD Instinct MI300X OAM"),
    MI300X,
    _MI300X_PEAKS,
    192 * GIGA,
    5300 * GIGA,
    "Infinity Fabric, 7 links",
    448 * GIGA,
    notes="64 GB/s a direction to each of the seven others.",
)
_MI250X = Device(
    "MI250X",
    ("AMD Instinct MI250X", "AMD Instinct MI250X / MI250", "AMD Instinct MI250X/MI250"),
    MI200,
    {name: peak / 2 for name, peak in _dense(fp32=95.7, bf16=383.0, fp16=383.0, int8=383.0).items()},
    64 * GIGA,
    3276.8 * GIGA / 2,
    "",
    None,
    multiprocessors=110,
    notes=f"{_HALF_CARD} fp32: of matrices. Links differ between pairs of dies.",
)

DEVICES: tuple[Device, ...] = (
    replace(
        _A100_SXM,
        name="A100 SXM 40 GB",
        names=("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        memory=40 * GIGA,
        bandwidth=1555 * GIGA,
    ),
    _A100_SXM,
    replace(
        _A100_PCIE,
        name="A100 PCIe 40 GB",
        names=("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
        memory=40 * GIGA,
        bandwidth=1555 * GIGA,
    ),
    _A100_PCIE,
    _H100_SXM,
    replace(
        _H100_SXM,
        name="H100 PCIe",
        names=("NVIDIA H100 PCIe",),
        source=H100_PCIE,
        peaks=_dense(fp32=51) | _halved(tf32=756, bf16=1513, fp16=1513, fp8=3026, int8=3026),
        bandwidth=2000 * GIGA,
        link_bandwidth=_NVLINK3,
        notes="NVLink only between two cards with a bridge, 600 GB/s in both directions.",
    ),
    _H100_NVL,
    replace(_H100_SXM, name="H200 SXM", names=("NVIDIA H200",), source=H200, memory=141 * GIGA, bandwidth=4800 * GIGA),
    replace(
        _H100_NVL,
        name="H200 NVL",
        names=("NVIDIA H200 NVL",),
        source=H200,
        memory=141 * GIGA,
        bandwidth=4800 * GIGA,
        link_bandwidth=_NVLINK4,
        notes="NVLink only between two or four cards with a bridge.",
    ),
    Device(
        "L4",
        ("NVIDIA L4",),
        L4,
        _dense(fp32=30.3) | _halved(tf32=120, bf16=242, fp16=242, fp8=485, int8=485),
        24 * GIGA,
        300 * GIGA,
        "PCIe 4.0 x16",
        _PCIE4,
        others={"link_bandwidth": PCI},
    ),
    Device(
        "L40S",
        ("NVIDIA L40S",),
        L40S,
        _dense(fp32=91.6, tf32=183, bf16=362.05, fp16=362.05, fp8=733, int8=733, int4=733),
        48 * GIGA,
        864 * GIGA,
        "PCIe 4.0 x16",
        _PCIE4,
        others={"link_bandwidth": PCI},
    ),
    replace(
        _B200,
        name="B100",
        names=("NVIDIA B100",),
        peaks=_dense(fp32=60) | _halved(tf32=1800, bf16=3500, fp16=3500, fp8=7000, fp6=7000, fp4=14000, int8=7000),
        memory=192 * GIGA,
        notes="HGX.",
        others={},
    ),
    _B200,
    replace(
        _B200,
        name="GB200",
        names=("NVIDIA GB200",),
        source=GB200,
        peaks=_dense(fp32=80) | _halved(tf32=2500, bf16=5000, fp16=5000, fp8=10000, fp6=10000, fp4=20000, int8=10000),
        memory=186 * GIGA,
        notes="One of the superchip's two GPUs, a 72nd of the rack's figures.",
        others={},
    ),
    _B300,
    replace(
        _B300,
        name="GB300",
        names=("NVIDIA GB300",),
        source=GB300,
        peaks=_halved(tf32=2500, bf16=5000, fp16=5000, fp8=10000, fp6=10000, int8=24_000 / 72) | _dense(fp4=15000),
        memory=279 * GIGA,
        bandwidth=8000 * GIGA,
        notes="One of the superchip's GPUs, a 72nd of the rack's figures.",
        others={"memory": ULTRA},
    ),
    _RTX_PRO,
    replace(
        _RTX_PRO,
        name="RTX PRO 6000 Blackwell Server Edition",
        names=("NVIDIA RTX PRO 6000 Blackwell Server Edition",),
        source=RTX_PRO_SERVER,
        peaks=_dense(fp32=120, **{name: 120 * ratio for name, ratio in _RTX_PRO_RATIOS.items()}),
        bandwidth=1597 * GIGA,
        notes="The data sheet has fp32, and fp4 with sparsity rounded to 4 PFLOPS: the others follow from fp32 by the"
        " ratios of the same chip in the whitepaper.",
        others={"link_bandwidth": PCI} | dict.fromkeys(_RTX_PRO_RATIOS, RTX_PRO),
    ),
    replace(
        _RTX_PRO,
        name="RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        names=("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",),
        source=RTX_PRO_MAX_Q,
        peaks=_dense(fp32=110) | _halved(**{name: 3511 * ratio / 16 for name, ratio in _RTX_PRO_RATIOS.items()}),
        notes="The data sheet has fp32, and 3511 AI TOPS, which is fp4 with sparsity: the others follow from that by"
        " the ratios of the same chip in the whitepaper.",
        others={"link_bandwidth": PCI} | dict.fromkeys(set(_RTX_PRO_RATIOS) - {"fp4"}, RTX_PRO),
    ),
    Device(
        "MI210",
        ("AMD Instinct MI210",),
        MI210,
        _dense(fp32=45.3, bf16=181.0, fp16=181.0, int8=181.0),
        64 * GIGA,
        1638.4 * GIGA,
        "",
        None,
        notes="fp32: of matrices. Links only between cards with a bridge.",
    ),
    replace(
        _MI250X,
        name="MI250",
        names=("AMD Instinct MI250", "AMD Instinct MI250X / MI250", "AMD Instinct MI250X/MI250"),
        peaks={name: peak / 2 for name, peak in _dense(fp32=90.5, bf16=362.1, fp16=362.1, int8=362.1).items()},
        multiprocessors=104,
    ),
    _MI250X,
    Device(
        "MI300A",
        ("AMD Instinct MI300A",),
        MI300A,
        _dense(fp32=122.6, tf32=490.3, bf16=980.6, fp16=980.6, fp8=1961.2, int8=1961.2),
        128 * GIGA,
        5300 * GIGA,
        "",
        None,
        notes="Links depend on how many are in a node.",
    ),
    _MI300X,
    replace(
        _MI300X,
        name="MI325X",
        names=("AMD Instinct MI325X", "AMD Instinct MI325 OAM"),
        source=MI325X,
        memory=256 * GIGA,
        bandwidth=6000 * GIGA,
    ),
    replace(
        _MI300X,
        name="MI350X",
        names=("AMD Instinct MI350X", "AMD Instinct MI350 OAM"),
        source=MI350X,
        peaks=_dense(fp32=144.2, bf16=2306.9, fp16=2306.9, fp8=4613.7, int8=4613.7, fp6=9227.5, fp4=9227.5),
        memory=288 * GIGA,
        bandwidth=8000 * GIGA,
        link_bandwidth=537.6 * GIGA,
        notes="76.8 GB/s a direction to each of the seven others.",
    ),
    replace(
        _MI300X,
        name="MI355X",
        names=("AMD Instinct MI355X", "AMD Instinct MI355 OAM"),
        source=MI355X,
        peaks=_dense(fp32=157.3, bf16=2516.6, fp16=2516.6, fp8=5033.2, int8=5033.2, fp6=10066.3, fp4=10066.3),
        memory=288 * GIGA,
        bandwidth=8000 * GIGA,
        link_bandwidth=537.6 * GIGA,
        notes="76.8 GB/s a direction to each of the seven others.",
    ),
)


def match(name: str, multiprocessors: int | None = None) -> Match:
    """The device that torch.cuda.get_device_name() calls `name`; never a guess.

    `multiprocessors` of torch.cuda.get_device_properties() tells devices apart that share a name. A part of a device
    (MIG) or one that is not in the table has no data sheet here, and its ceilings are not known.
    """
    wanted = _normal(name)
    named = [device for device in DEVICES if wanted in map(_normal, device.names)]
    counted = [device for device in named if multiprocessors is not None and device.multiprocessors == multiprocessors]
    found = named if len(named) == 1 else counted
    if len(found) == 1:
        return Match(found[0], f"{name}: figures of {found[0].source}.")
    measure = "What it can do is not known here, and no share of it is given."
    if named:
        names = " or ".join(device.name for device in named)
        return Match(None, f"{name} is {names}, and nothing says which. {measure}")
    if re.search(r"\bmig\b", wanted):
        return Match(None, f"{name} is a part of a device, of which no data sheet speaks. {measure}")
    return Match(None, f"{name or 'A device without a name'} is not in the table of data sheets. {measure}")


def _normal(name: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))
