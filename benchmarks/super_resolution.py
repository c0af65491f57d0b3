# SPDX-License-Identifier: Apache-2.0
r"""Training for super-resolution: throughput, memory and loss; precisions; against a U-NO.

The task is cdo's: Kolmogorov flow at Reynolds number 40 on a 64 x 64 torus, one field given a
window of seven frames at an eighth of the resolution, batches of 128. All networks are trained by
the same trainer with the same loss, data and number of images: ours in three precisions, and
neuraloperator's U-NO in the size of cdo's (31 M parameters) in fp32 with TF32 products, at two
learning rates. cdo's own figures, for the ratios: 417 images/s and 35.3 GiB on one H200.

    python benchmarks/super_resolution.py --out benchmarks/results/super_resolution.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from report import machine, publish
from torch import Tensor, nn

from ddo_modulus.data.loader import BatchOptions, TensorLoader
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.fields.gaussian_field import GaussianField, MeasuredSpectrum
from ddo_modulus.simulators import KolmogorovFlow
from ddo_modulus.training import Fold, Trainer, TrainerConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CDO_IMAGES, CDO_MEMORY = 417.0, 35.3
REACH, FACTOR = 3, 8
NETWORK = {"widths": [64, 96, 128], "depths": [2, 2, 2], "modes": [23, 23, 15]}


class UNO(nn.Module):
    """neuraloperator's U-NO with the noise level as one more channel."""

    def __init__(self, channels: int, widths: list[int], modes: int) -> None:
        super().__init__()
        from neuralop.models import UNO

        self.net = UNO(
            channels + 1,
            1,
            widths[0],
            n_layers=5,
            uno_out_channels=widths,
            uno_n_modes=[[modes] * 2] * 5,
            uno_scalings=[[1, 1], [0.5, 0.5], [1, 1], [1, 1], [2, 2]],
            channel_mlp_skip="linear",  # its default fails where the width changes
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Network of the same signature as ours."""
        level = sigma.log().view(-1, 1, 1, 1).expand(-1, 1, *x.shape[-2:])
        return self.net(torch.cat([x, level], 1))


def windows(trajectories: int, frames: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Fields, and the upsampled coarse windows around them, in standard deviations."""
    flow = KolmogorovFlow(reynolds=40.0, resolution=size, output_resolution=size, drag=0.0)
    generator = torch.Generator().manual_seed(seed)
    runs = flow.simulate(trajectories, frames, generator=generator, device=DEVICE, batch=1024)
    x = torch.cat(list(runs))
    x = (x - x.mean()) / x.std()
    coarse = nn.functional.avg_pool2d(x.reshape(-1, 1, size, size), FACTOR)
    up = nn.functional.interpolate(coarse, scale_factor=FACTOR, mode="bicubic")
    up = up.view(trajectories, frames, size, size)
    span = 2 * REACH + 1
    condition = torch.stack([up[:, i : frames - span + 1 + i] for i in range(span)], 2)
    middle = x[:, REACH : frames - REACH]
    return middle.reshape(-1, 1, size, size), condition.flatten(0, 1)


def build(x: Tensor, size: int, network: nn.Module | None) -> DiffusionOperator:
    """An operator with the given network in place of its own."""
    torch.manual_seed(0)
    noise = {"length_scale": 0.005, "smoothness": 0.5}
    options = NETWORK if DEVICE.type == "cuda" else {"widths": [8], "depths": [1], "modes": [5]}
    operator = DiffusionOperator(
        [size, size], 1, "torus", [1.0, 1.0], noise, 2 * REACH + 1, network=options
    )
    spectrum = MeasuredSpectrum.fit(operator.basis, x[:4096].cpu())
    operator.set_prior(GaussianField(operator.basis, spectrum))
    if network is not None:
        operator.network = network
    return operator


def train(
    operator: DiffusionOperator,
    data: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    config: TrainerConfig,
) -> tuple[float, float, float]:
    """Validation loss, images a second and peak memory in GiB, the data not counted."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    states, condition = data
    loader = TensorLoader(states, BatchOptions(config.batch, config.seed), condition)
    trainer = Trainer(operator, [Fold(loader.batches)], held, config)
    if any(parameter.is_complex() for parameter in operator.parameters()):
        # Fused AdamW takes no complex weights.
        trainer.optimizer = torch.optim.AdamW(
            operator.parameters(), config.learning_rate, (0.9, 0.99), weight_decay=1e-2
        )
        trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, trainer._rate)
    trainer.run()
    last = trainer.history[-1]
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if DEVICE.type == "cuda" else 0.0
    return last["validation"], last["samples_per_second"], peak


def main() -> None:
    """Train all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--trajectories", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    cuda = DEVICE.type == "cuda"
    size, frames, batch = (64, 26, 128) if cuda else (16, 8, 8)
    data = windows(arguments.trajectories, frames, 1, size)
    held = windows(max(arguments.trajectories // 16, 2), frames, 2, size)
    uno = ([64, 108, 108, 108, 64], 32) if cuda else ([8, 8, 8, 8, 8], 4)
    cases: list[tuple[str, nn.Module | None, str, float]] = [
        ("ours, bf16", None, "bf16", 2e-3),
        ("ours, fp16", None, "fp16", 2e-3),
        ("ours, fp32", None, "fp32", 2e-3),
        ("U-NO, fp32 (TF32)", UNO(10, *uno), "fp32", 1e-3),
        ("U-NO, fp32 (TF32)", UNO(10, *uno), "fp32", 3e-4),
    ]
    rows = []
    for name, network, precision, rate in cases:
        operator = build(data[0], size, network)
        weights = sum(p.numel() for p in operator.parameters()) / 1e6
        config = TrainerConfig(
            steps=arguments.steps,
            batch=batch,
            precision=precision,
            learning_rate=rate,
            compile=cuda and network is None,  # torch.compile fails on U-NO's weights
            validate_every=arguments.steps // 2,
            figure=False,
            loggers=(),
        )
        loss, speed, peak = train(operator, data, held, config)
        rows.append(
            f"| {name} | {weights:.2f} M | {rate:g} | {loss:.4f} | {speed:.0f} "
            f"| {speed / CDO_IMAGES:.1f} | {peak:.1f} | {peak / CDO_MEMORY:.2f} |"
        )
        print(rows[-1], flush=True)
    publish(
        [
            "# Training for super-resolution",
            "",
            f"{machine()}; {arguments.steps} steps of {batch} images from "
            f"{len(data[0])}; {len(held[0])} to validate on. "
            "`python benchmarks/super_resolution.py`",
            "",
            "| network | parameters | learning rate | validation loss | images/s "
            "| over cdo's 417 | peak, GiB | over cdo's 35.3 |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
        ],
        arguments.out,
    )


if __name__ == "__main__":
    main()
