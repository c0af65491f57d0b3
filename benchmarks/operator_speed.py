# SPDX-License-Identifier: Apache-2.0
r"""Speed and memory of the neural operator: against neuraloperator's U-NO, and against the roof.

Forward and backward pass of one batch at equal channels, depth and modes, each network at its best
setting: ours in bf16, compiled and as a CUDA graph; U-NO in fp32 with TF32 products (its transforms
do not take bf16), the best of plain, compiled and as a CUDA graph.

The roof: for each layer of ours the larger of two times, its bytes over the bandwidth of a copy and
its operations over the rate of a large matrix product, both measured in the same run. A layer reads
each of its inputs once and writes each of its outputs once, forward and backward; layers are the
normalisation, the local map, the spectral map, and the activation with the way back to the width.

    python benchmarks/operator_speed.py --out benchmarks/results/operator_speed.md
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from report import machine, publish
from torch import Tensor, nn

from ddo_modulus.nn.operator import Block, NeuralOperator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS, DEPTHS = [64, 96], [1, 2]
UNO_WIDTHS = [64, 96, 96, 96, 64]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        batch: States.
        channels: In and out.
        shape: Grid.
        domain: Of our operator; U-NO is periodic.
        modes: Along each axis: ours the odd number of sines and cosines nearest to U-NO's.
    """

    batch: int
    channels: int
    shape: tuple[int, int]
    domain: str
    modes: int

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.batch}x{self.channels}x{self.shape[0]}x{self.shape[1]}"


CASES = [Case(32, 1, (128, 128), "torus", 32), Case(1, 16, (720, 1440), "box", 64)]
SMALL = [Case(2, 1, (32, 32), "torus", 8)]


def ours(case: Case) -> NeuralOperator:
    """The operator of this package."""
    return NeuralOperator(
        case.channels,
        case.channels,
        {"domain": case.domain, "shape": list(case.shape)},
        widths=WIDTHS,
        depths=DEPTHS,
        modes=[case.modes + 1] * 2,
    )


class UNO(nn.Module):
    """neuraloperator's U-NO behind the same signature."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from neuralop.models import UNO

        self.net = UNO(
            case.channels,
            case.channels,
            64,
            n_layers=5,
            uno_out_channels=UNO_WIDTHS,
            uno_n_modes=[[case.modes] * 2] * 5,
            uno_scalings=[[1, 1], [0.5, 0.5], [1, 1], [1, 1], [2, 2]],
            channel_mlp_skip="linear",  # its default fails where the width changes
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """U-NO knows no noise level; the time is the same."""
        return self.net(x)


def median(run: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds of a call."""
    if DEVICE.type == "cpu":
        import time

        run()
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def step(
    network: nn.Module, inputs: tuple[Tensor, ...], *, half: bool, graph: bool
) -> Callable[[], object]:
    """A forward and backward pass, ready to be timed."""

    def run() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            out = network(*inputs)
        out.backward(inputs[0].to(out.dtype))  # of the same shape, and costs nothing to make

    if not graph or DEVICE.type == "cpu":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        run()
    return recorded.replay


def measure(
    build: Callable[[], nn.Module],
    inputs: tuple[Tensor, ...],
    *,
    half: bool,
    compiled: str | None,
    graphs: Sequence[bool],
) -> list[tuple[float, float]]:
    """Milliseconds and peak GiB of a forward and backward pass, launched and as a CUDA graph."""
    torch._dynamo.reset()
    cuda = DEVICE.type == "cuda"
    before = _settled()
    network = build().to(DEVICE)
    if cuda and compiled:
        network.compile(mode=compiled)
    results = []
    for graph in graphs:
        time = median(step(network, inputs, half=half, graph=graph))
        peak = torch.cuda.max_memory_allocated() - before if cuda else math.nan
        results.append((time, peak / 2**30))
        network.zero_grad(set_to_none=True)
        _settled()
    return results


def _settled() -> int:
    """Bytes in use when all that is free is given back; the peak is counted from here on."""
    gc.collect()
    if DEVICE.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def ceilings() -> tuple[float, float]:
    """Bytes a millisecond of a copy, operations a millisecond of a matrix product."""
    large = DEVICE.type == "cuda"
    x = torch.randn(2**29 if large else 2**22, device=DEVICE)
    y = torch.empty_like(x)
    copy = 8 * x.numel() / median(lambda: y.copy_(x))
    n = 8192 if large else 256
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    return copy, 2 * n**3 / median(lambda: a @ a)


@dataclass(frozen=True)
class Layer:
    """Work of a layer, forward and backward: values moved (in bf16) and operations."""

    name: str
    values: float
    operations: float

    def floor(self, copy: float, product: float) -> float:
        """Milliseconds that it takes at least."""
        return max(2 * self.values / copy, self.operations / product)


def block_layers(block: Block, batch: int, shape: tuple[int, int]) -> list[Layer]:
    """Layers of a block on a grid."""
    points = batch * shape[0] * shape[1]
    width, hidden = block.out.out_features, block.out.in_features
    taps = block.local.in_features
    rows, columns = block.spectral.transform.modes
    c, h = points * width, points * hidden
    # Transforms: along the rows for all columns, then along the columns for the modes left.
    transform = 2 * batch * rows * (shape[0] * shape[1] + columns * shape[1])
    spectral = transform * (width + hidden) + 2 * batch * rows * columns * width * hidden
    # Forward: inputs, outputs. Backward: gradient of the output and what the layer needs of its
    # inputs, gradient of the inputs. A product costs twice its forward operations on the way back.
    return [
        Layer("normalisation", (c + c) + (c + c + c), 0),
        Layer("local map", (c + h) + (h + c + c), 6 * points * taps * hidden),
        Layer("spectral map", (c + h) + (h + c), 3 * spectral),
        Layer("mixing", (2 * h + c + c) + (c + h + h), 6 * points * hidden * width),
    ]


def network_layers(network: NeuralOperator, case: Case) -> list[list[Layer]]:
    """Layers of all parts of the operator."""
    parts = []
    grids = [level.transform.fine for level in network.levels]
    for level, grid in zip(network.levels, grids, strict=True):
        for block in [*level.down, *level.up]:
            parts.append(block_layers(block, case.batch, grid))
    for i, bridge in enumerate(network.bridges):
        fine, coarse = (case.batch * math.prod(g) for g in grids[i : i + 2])
        wide, deep = bridge.grow.out_features, bridge.grow.in_features
        one, other = fine * wide, coarse * deep
        band = math.prod(bridge.transform.modes) * case.batch
        # Ideally channels are mapped and the band is cut in one go, each way and back.
        work = 2 * (fine + coarse) * wide * deep + 2 * band * sum(grids[i]) * deep
        down = Layer("down", 2 * (one + other), 3 * work)
        parts.append([down, Layer("up", 2 * (other + 2 * one), 3 * work)])
    points, width = case.batch * math.prod(case.shape), network.lift.out_features
    narrow = points * case.channels * 2  # float32
    lift = Layer("lift", 2 * (narrow + points * width), 0)
    return [*parts, [lift, Layer("head", 2 * narrow + 3 * points * width, 0)]]


def roofline(case: Case, mode: str, whole: float, copy: float, product: float) -> list[str]:
    """Table of blocks, and the whole step, over their floors."""
    network = ours(case).to(DEVICE)
    if DEVICE.type == "cuda":
        network.compile(mode=mode)
    rows, floor = [], 0.0
    for layers in network_layers(network, case):
        floor += sum(layer.floor(copy, product) for layer in layers)
    for level in network.levels:
        block, grid = level.down[0], level.transform.fine
        layers = block_layers(block, case.batch, grid)
        least = sum(layer.floor(copy, product) for layer in layers)
        dtype = torch.bfloat16
        h = torch.randn(case.batch, *grid, block.out.out_features, device=DEVICE, dtype=dtype)
        embedding = torch.randn(case.batch, block.modulation.in_features, device=DEVICE)

        def run(h: Tensor, embedding: Tensor, block: Block = block) -> Tensor:
            return block(h.detach().requires_grad_(), embedding)  # gradients are not added up

        wrapped = _Part(block, run)
        time = median(step(wrapped, (h, embedding), half=True, graph=True))
        shares = ", ".join(
            f"{layer.name} {layer.floor(copy, product) * 1e3:.0f}" for layer in layers
        )
        rows.append(
            f"| {case.name} | block {grid[0]}x{grid[1]}, {block.out.out_features} channels "
            f"| {time:.3f} | {least:.3f} | {time / least:.1f} | {shares} |"
        )
    rows.append(f"| {case.name} | whole step | {whole:.2f} | {floor:.2f} | {whole / floor:.1f} | |")
    return rows


class _Part(nn.Module):
    """A part of a network, called by a function."""

    def __init__(self, part: nn.Module, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.part, self.run = part, run

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call it."""
        return self.run(*inputs)


def count(network: nn.Module) -> str:
    """Parameters, in millions."""
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mode", default="default", help="torch.compile's, for ours")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    copy, product = ceilings()
    speed, roof = [], []
    for case in CASES if DEVICE.type == "cuda" else SMALL:
        x = torch.randn(case.batch, case.channels, *case.shape, device=DEVICE)
        sigma = torch.rand(case.batch, device=DEVICE) + 0.1
        theirs = {}
        for name, compiled, graphs in (
            ("plain", None, [False]),
            ("compiled", "default", [False, True]),
        ):
            try:
                found = measure(
                    partial(UNO, case), (x, sigma), half=False, compiled=compiled, graphs=graphs
                )
            except RuntimeError as error:
                print(f"U-NO, {name}, {case.name}: {str(error).splitlines()[0]}", flush=True)
                continue
            for graph, result in zip(graphs, found, strict=True):
                theirs[f"{name}, graph" if graph else name] = result
            print(case.name, theirs, flush=True)
        [mine] = measure(
            partial(ours, case), (x, sigma), half=True, compiled=arguments.mode, graphs=[True]
        )
        best = min(theirs, key=lambda name: theirs[name][0])
        for name, (time, peak) in theirs.items():
            speed.append(
                f"| {case.name} | U-NO, fp32 (TF32), {name} | {count(UNO(case))} | {time:.2f} "
                f"| {peak:.2f} | {'1' if name == best else ''} | |"
            )
        speed.append(
            f"| {case.name} | ours, bf16, graph | {count(ours(case))} | {mine[0]:.2f} "
            f"| {mine[1]:.2f} | {theirs[best][0] / mine[0]:.1f} | {mine[1] / theirs[best][1]:.2f} |"
        )
        print(speed[-1], flush=True)
        roof += roofline(case, arguments.mode, mine[0], copy, product)
    publish(
        [
            "# Speed of the neural operator",
            "",
            f"{machine()}. Copy {copy / 1e9:.2f} TB/s, bf16 product "
            f"{product / 1e9:.0f} TFLOP/s. `python benchmarks/operator_speed.py`",
            "",
            "| case | network | parameters | forward + backward, ms | peak, GiB "
            "| times faster than U-NO's best | memory over U-NO's best |",
            "|---|---|---|---|---|---|---|",
            *speed,
            "",
            "| case | part | ms | floor, ms | over floor | floors of the layers, µs |",
            "|---|---|---|---|---|---|",
            *roof,
        ],
        arguments.out,
    )


if __name__ == "__main__":
    main()
