"""The optimizers on a CUDA device: half precision against float64, one NCCL rank against the CPU, no waiting, memory.

Skipped without a device. One device suffices; what needs several is tested on gloo in tests/dist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.dist.group import free_port
from trainer.optim import ShardedOptimizer
from trainer.optim.polar import COEFFICIENTS, polar, reference
from trainer.optim.sharded import orthogonalizes
from trainer.registry import alternatives

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

RULES = sorted(alternatives("trainer.optim"))
MATRIX_RULES = [name for name in RULES if orthogonalizes(alternatives("trainer.optim")[name])]
HALF_RULES = [name for name in RULES if hasattr(alternatives("trainer.optim")[name].Options, "polar_dtype")]
SHAPES = [(256, 640), (640, 256), (512, 512), (97, 64), (3, 128, 192), (512, 512)]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """One rank over NCCL."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


def build(rule: str, mesh: DeviceMesh | None, shapes: list[Any], engine: Any = None, **options: Any) -> Any:
    """Weights and their optimizer: sharded on the device, or plain on the CPU without a mesh."""
    full = [draw(i, *shape).float() for i, shape in enumerate(shapes)]
    weights = [nn.Parameter(place(t, mesh)) for t in full]
    return weights, ShardedOptimizer([{"rule": rule, "params": weights, **options}], **(engine or {}))


def place(full: Tensor, mesh: DeviceMesh | None) -> Tensor:
    return full if mesh is None else distribute_tensor(full.cuda(), mesh, [Shard(0)])


def give_gradients(weights: list[nn.Parameter], mesh: DeviceMesh | None, step: int) -> None:
    for i, weight in enumerate(weights):
        weight.grad = place(draw(1000 * step + i, *weight.shape).float(), mesh)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().double()


def errors(x: Tensor, name: str, dtype: torch.dtype, **options: Any) -> Tensor:
    expected = reference(x, name)
    return (polar(x.float(), name, dtype, **options).double() - expected).norm(dim=(-2, -1)) / expected.norm(
        dim=(-2, -1)
    )


@pytest.mark.parametrize("shape", [(512, 512), (512, 2048), (2048, 512)])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_half_precision_against_float64(name, shape) -> None:
    """fp16 at most 0.01 off the polynomial, bf16 0.06 (cans 2.5 times as much), and fp16 at least 4 times as exact."""
    x, steep = draw(0, 2, *shape).cuda(), 2.5 if name == "cans" else 1.0
    half, brain = (errors(x, name, dtype).max() for dtype in (torch.float16, torch.bfloat16))
    assert half < 0.01 * steep
    assert brain < 0.06 * steep
    assert brain > 4 * half
    assert errors(x, name, torch.float32).max() < 5e-5 * steep  # TF32 would not do
    assert errors(x, name, torch.float16, form="gram").max() < 2.0**-10


def test_scales_zeros_and_sick_neighbours_in_fp16() -> None:
    x = draw(1, 4, 128, 320).cuda().float()
    plain = polar(x, dtype=torch.float16)
    for exponent in (-100, -40, 40, 100):
        assert torch.equal(polar(x * 2.0**exponent, dtype=torch.float16), plain)
    for factor in (1e-12, 1e12):
        assert (polar(x * factor, dtype=torch.float16) - plain).abs().max() < 0.01
    x[0], x[1, 3, 4] = 0, float("nan")
    result = polar(x, dtype=torch.float16)
    assert (result[0] == 0).all()
    assert result[1].isnan().any()
    assert result[2:].isfinite().all()
    assert (result[2:] - plain[2:]).abs().max() < 0.01


@pytest.mark.parametrize("rule", RULES)
def test_one_nccl_rank_does_the_steps_of_the_cpu(rule, mesh) -> None:
    """Three steps: in fp32 to 1e-5 of the weights, in the device's own precision to 2% of what they moved."""
    exact = {"polar_dtype": "fp32"} if rule in HALF_RULES else {}
    for options, bound in ((exact, None), ({}, 0.02)):
        ends: list[list[Tensor]] = []
        for where in (mesh, None):
            precision = options if where is not None else exact
            weights, optimizer = build(rule, where, SHAPES, lr=0.1, weight_decay=0.2, **precision)
            for step in (1, 2, 3):
                give_gradients(weights, where, step)
                optimizer.step()
            assert optimizer.take_rejected() == 0
            ends.append([whole(w) for w in weights])
        for i, (device, cpu) in enumerate(zip(*ends, strict=True)):
            most = 1e-5 * cpu.abs().max() if bound is None else bound * (cpu - draw(i, *cpu.shape)).abs().max()
            assert (device - cpu).abs().max() < most


@pytest.mark.parametrize("rule", RULES)
def test_no_step_waits_for_the_device(rule, mesh) -> None:
    weights, optimizer = build(rule, mesh, SHAPES, lr=0.1, weight_decay=0.1)
    for step in (1, 2):
        give_gradients(weights, mesh, step)
        if step == 2:
            weights[1].grad = None
            weights[0].grad.mul_(float("nan"))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")  # the first step may load kernels
        try:
            optimizer.step()
            if step == 2:
                with pytest.raises(RuntimeError, match="synchroniz"):
                    weights[2].to_local().sum().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.take_rejected() == (rule not in ("adamw", "dct_adamw"))  # these take a gradient as it is


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_memory_of_a_step_is_a_small_multiple_of_a_bucket(rule, mesh) -> None:
    """At most 12 buckets, as on the CPU, whatever the number of matrices."""
    size = 1024 * 1024 * 2  # bytes of a matrix in bf16

    def peak(count: int, per_bucket: int) -> float:
        weights, optimizer = build(rule, mesh, [(1024, 1024)] * count, {"bucket_bytes": per_bucket * size})
        for step in (1, 2):
            give_gradients(weights, mesh, step)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.step()
            torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / (per_bucket * size)

    few, many = peak(16, 4), peak(48, 4)
    assert many < 12
    assert many < 1.1 * few
    if rule in HALF_RULES:  # these hold whole matrices
        assert peak(48, 48) * 12 > 24
