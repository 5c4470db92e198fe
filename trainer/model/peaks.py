"""What devices can do: peak arithmetic and memory, by name. Imports no torch."""

from __future__ import annotations

import re

# Dense peaks in TFLOP/s as the makers state them: (bf16, fp32 without TF32), by a pattern of the device's name.
PEAKS = (
    (r"B200", 2250.0, 80.0),
    (r"H200", 989.0, 67.0),
    (r"H100 NVL", 835.0, 60.0),
    (r"H100 PCIe", 756.0, 51.0),
    (r"H100 80GB HBM3", 989.0, 67.0),
    (r"A100", 312.0, 19.5),
    (r"L40S", 362.0, 91.6),
    (r"L4$", 121.0, 30.3),
    (r"RTX 4090", 165.2, 82.6),
    (r"MI300X", 1307.4, 163.4),
)

# What `orthogon plan --gpu` knows: the name as the device tells it, and its memory in bytes as the driver counts it.
GPUS = {
    "b200": ("NVIDIA B200", 180 * 2**30),
    "h200": ("NVIDIA H200", 140 * 2**30),
    "h100": ("NVIDIA H100 80GB HBM3", 79 * 2**30),
    "h100-nvl": ("NVIDIA H100 NVL", 93 * 2**30),
    "h100-pcie": ("NVIDIA H100 PCIe", 79 * 2**30),
    "a100": ("NVIDIA A100-SXM4-80GB", 79 * 2**30),
    "a100-40gb": ("NVIDIA A100-SXM4-40GB", 39 * 2**30),
    "l40s": ("NVIDIA L40S", 44 * 2**30),
    "l4": ("NVIDIA L4", 22 * 2**30),
    "rtx-4090": ("NVIDIA GeForce RTX 4090", 23 * 2**30),
    "mi300x": ("AMD Instinct MI300X", 191 * 2**30),
}


def peak_of(name: str, precision: str) -> float | None:
    """Peak operations per second of a device in `bf16` or `fp32`, by its name; None for one that is not in the table."""
    for pattern, bf16, fp32 in PEAKS:
        if re.search(pattern, name):
            return 1e12 * (bf16 if precision == "bf16" else fp32)
    return None
