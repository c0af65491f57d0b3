# SPDX-License-Identifier: Apache-2.0
"""``ddo export``: ONNX graphs of a package, for inference engines."""

from __future__ import annotations

from omegaconf import DictConfig, ListConfig
from rich.table import Table

from ddo_modulus.cli.options import flag
from ddo_modulus.console import progress_bar, show
from ddo_modulus.data.output import ENGINE, check_output
from ddo_modulus.diffusion.package import Package
from ddo_modulus.engines.folder import export
from ddo_modulus.errors import InputError


def run(config: DictConfig) -> None:
    """Export a package; the keys are those of ``conf/export.yaml``.

    Raises:
        InputError: If an argument or the package cannot be used, or the folder exists.
    """
    overwrite = flag(config, "overwrite")
    inputs = [config.package]
    out = check_output(config.out, overwrite=overwrite, kind=ENGINE, inputs=inputs)
    external = flag(config, "external")
    shape = _shape(config.resolution)
    package = Package.load(config.package)
    with progress_bar("export") as progress:
        contract = export(
            package,
            out,
            precision=config.precision,
            shape=shape,
            external=external,
            overwrite=overwrite,
            progress=progress,
        )
    table = Table(title=f"{contract.precision} on {contract.shape[0]}x{contract.shape[1]}")
    for column in ("graph", "MB", "output", "relative error"):
        table.add_column(column)
    for graph, output in (("denoiser", "denoised"), ("denoiser_vjp", "product")):
        size = sum(f.stat().st_size for f in out.glob(f"{graph}.onnx*")) / 1e6
        table.add_row(graph, f"{size:.1f}", output, f"{contract.tolerance[output]:.1e}")
    table.caption = f"against the operator in fp32; computed by {contract.measured_with}"
    show(table)
    print(out)


def _shape(resolution: object) -> tuple[int, int] | None:
    """Grid of a configuration: one number for both axes, or two."""
    if resolution is None:
        return None
    both = resolution if isinstance(resolution, ListConfig) else [resolution, resolution]
    sizes = [n for n in both if isinstance(n, int) and not isinstance(n, bool) and n >= 2]
    if len(both) != 2 or len(sizes) != 2:
        raise InputError(f"resolution={resolution} must be a number of points, or [rows,columns]")
    return sizes[0], sizes[1]
