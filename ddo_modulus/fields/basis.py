# SPDX-License-Identifier: Apache-2.0
r"""Real orthonormal bases on the torus, the box and the sphere, on any grid.

Axes: ``H W`` grid (rows, columns), ``K`` spectral coefficients, ``K1 K2`` row and column modes.

A basis is a finite set of eigenfunctions :math:`\phi_k` of the Laplacian,
:math:`-\Delta \phi_k = \lambda_k \phi_k`, orthonormal in the mean over the domain,
:math:`\frac{1}{|D|} \int \phi_i \phi_j = \delta_{ij}`. A function
:math:`x = \sum_k c_k \phi_k` is determined by its coefficients on every grid, so Gaussian
fields, spectral layers, preconditioners and spectra all work with the same coefficients.

All functions are products of a row and a column function, so a transform is two real matrix
products, which export (FFTs do not). On the sphere the row matrix depends on the zonal order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddo_modulus.compat import lasting
from ddo_modulus.errors import InputError
from ddo_modulus.fields.grid import as_pair
from ddo_modulus.fields.linalg import Rounded

Array = np.ndarray


class Basis(ABC):
    """Eigenfunctions of the Laplacian on a domain, with a default grid to evaluate them on.

    Subclasses give the row and column functions; everything else lives here.

    Attributes:
        shape: Default grid ``(H, W)``.
        modes: Number of row and column functions ``(K1, K2)``.
        indices: ``(K, 2)`` row and column function of each coefficient. Two bases of one family
            mean the same function by the same pair.
        eigenvalues: ``(K,)`` float64, of the negative Laplacian.
    """

    #: Laplacian eigenvalue per unit of squared wavenumber: the spectral dimension of the domain.
    dimension = 2

    def __init__(self, shape: Sequence[int], modes: Sequence[int]) -> None:
        self.shape = as_pair(shape, "shape")
        self.modes = as_pair(modes, "modes")
        self._matrices: dict[tuple, tuple[Tensor, Tensor]] = {}
        indices, eigenvalues = self._spectrum()
        self.indices = torch.from_numpy(indices)
        self.eigenvalues = torch.from_numpy(eigenvalues)

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: not the matrices, which are large and belong to a device."""
        return self.__dict__ | {"_matrices": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The basis itself: nothing in it changes but what is made once and kept."""
        return self

    @property
    def size(self) -> int:
        """Number of coefficients ``K``."""
        return len(self.eigenvalues)

    # ---- what each domain defines -------------------------------------------------------------

    @abstractmethod
    def _spectrum(self) -> tuple[Array, Array]:
        """Indices ``(K, 2)`` and eigenvalues ``(K,)``."""

    @abstractmethod
    def _columns(self, width: int) -> Array:
        """Column functions on the grid, ``(W, K2)``."""

    @abstractmethod
    def _rows(self, height: int) -> Array:
        """Row functions on the grid, ``(H, K1)``; ``(K2, H, K1)`` if they depend on the column."""

    @abstractmethod
    def weights(self, shape: Sequence[int] | None = None) -> Float[Tensor, "H W"]:
        """Share of the domain that each grid point stands for; sums to one."""

    @abstractmethod
    def at(self, shape: Sequence[int]) -> Self:
        """The same family on another grid.

        A basis that fills its grid's band fills the new grid's band too; a truncated one keeps its
        modes as far as the new grid resolves them.
        """

    @abstractmethod
    def truncate(self, modes: int | Sequence[int]) -> Self:
        """The same basis with fewer functions, at most ``modes`` along each axis."""

    @abstractmethod
    def resolves(self, shape: Sequence[int]) -> bool:
        """Whether a grid of this shape can distinguish all functions of the basis."""

    # ---- transforms ---------------------------------------------------------------------------

    def analyze(
        self, x: Float[Tensor, "*batch H W"], *, rounded: bool = False
    ) -> Float[Tensor, "*batch K"]:
        r"""Coefficients of the band-limited function that fits the field best (least squares).

        Args:
            x: Fields, of which the grid is read off; it may be any that resolves the basis.
            rounded: Whether factors of products may lose digits for speed
                (:class:`~ddo_modulus.fields.linalg.Rounded`).

        Raises:
            InputError: If the grid of ``x`` is too coarse for the basis.
        """
        shape = (x.shape[-2], x.shape[-1])
        if not self.resolves(shape):
            raise InputError(
                f"a {shape[0]}x{shape[1]} grid cannot resolve {self!r}; truncate the basis or "
                "use its .at(shape)"
            )
        rows, columns = self.matrices(shape, x.dtype, x.device, inverse=True)
        return self._gather(_multiplied(_to_modes, _to_grid, rows, columns, x, rounded))

    def synthesize(
        self,
        coefficients: Float[Tensor, "*batch K"],
        shape: Sequence[int] | None = None,
        *,
        rounded: bool = False,
    ) -> Float[Tensor, "*batch H W"]:
        """Values of the function on a grid of shape ``shape`` (the default grid if None).

        ``rounded`` as in :meth:`analyze`.
        """
        rows, columns = self.matrices(
            self.shape if shape is None else shape, coefficients.dtype, coefficients.device
        )
        rectangle = self._scatter(coefficients)
        return _multiplied(_to_grid, _to_modes, rows, columns, rectangle, rounded)

    def synthesize_adjoint(self, v: Float[Tensor, "*batch H W"]) -> Float[Tensor, "*batch K"]:
        """Euclidean adjoint of :meth:`synthesize` for the grid of ``v``."""
        rows, columns = self.matrices((v.shape[-2], v.shape[-1]), v.dtype, v.device)
        return self._gather(_to_modes(rows.mT, columns.mT, v))

    def matrices(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        *,
        inverse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Row and column matrices of :meth:`synthesize`, or of :meth:`analyze` if ``inverse``.

        Returns:
            ``(H, K1)`` or ``(K2, H, K1)``, and ``(W, K2)``; axes swapped if ``inverse``.
        """
        shape = as_pair(shape, "shape")
        key = (shape, dtype, str(device), inverse)
        if key not in self._matrices:
            rows, columns = self._rows(shape[0]), self._columns(shape[1])
            if inverse:
                columns = np.linalg.pinv(columns)
                # Rows in quadrature weights, so that the fit is the domain's, not the grid's.
                with lasting():
                    weights = self.weights(shape).sum(1).numpy()
                root = np.sqrt(weights)[:, None]
                rows = np.linalg.pinv(root * rows) * root.T
            # Values below the rounding of the sum would only cost time (denormals, near the poles).
            with lasting():
                self._matrices[key] = tuple(  # type: ignore[assignment]
                    torch.from_numpy(np.where(np.abs(m) < 1e-17, 0.0, m)).to(device, dtype)
                    for m in (rows, columns)
                )
        return self._matrices[key]

    def _gather(self, rectangle: Tensor) -> Tensor:
        """``(..., K1, K2)`` to ``(..., K)``."""
        return rectangle.flatten(-2)

    def _scatter(self, coefficients: Tensor) -> Tensor:
        """``(..., K)`` to ``(..., K1, K2)``."""
        return coefficients.unflatten(-1, self.modes)

    def coordinates(
        self,
        functions: Sequence[int],
        shape: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, "F H W"]:
        """The first row functions and column functions after the constant, as fields (float32)."""
        shape = self.shape if shape is None else as_pair(shape, "shape")
        rows, columns = self.matrices(shape, torch.float32, device)
        rows = rows[0] if rows.ndim == 3 else rows  # on the sphere: the zonal ones
        down = rows[:, 1 : 1 + functions[0]].T[:, :, None].expand(-1, -1, shape[1])
        across = columns[:, 1 : 1 + functions[1]].T[:, None, :].expand(-1, shape[0], -1)
        return torch.cat([down, across])

    def shared(self, other: Basis) -> tuple[Tensor, Tensor]:
        """Coefficients, here and in another basis of the family, of the functions in both."""
        with lasting():
            base = 1 + max(int(self.indices.max()), int(other.indices.max()))
            mine, theirs = (b.indices[:, 0] * base + b.indices[:, 1] for b in (self, other))
            _, here, there = np.intersect1d(mine.numpy(), theirs.numpy(), return_indices=True)
            return torch.from_numpy(here), torch.from_numpy(there)

    # ---- spectra ------------------------------------------------------------------------------

    def mean_square(self) -> Float[Tensor, " K"]:
        """Mean square of each function over the default grid: one, up to quadrature error."""
        rows, columns = self.matrices(self.shape)
        row = (rows.square() * self.weights().sum(1)[:, None]).sum(-2)
        row = row[:, None] if row.ndim == 1 else row.mT
        return self._gather(row * columns.square().mean(0))

    @abstractmethod
    def symmetry(self) -> Tensor:
        """Label ``(K,)`` shared by functions that a homogeneous field gives the same variance."""

    def shells(self) -> tuple[Float[Tensor, " S"], Tensor]:
        """Isotropic wavenumber shells for radially averaged spectra.

        Returns:
            Centre wavenumbers ``(S,)`` (units of 1/length, angular) and the shell of each
            coefficient ``(K,)``. A shell is one fundamental wavenumber wide.
        """
        wavenumber = self.eigenvalues.sqrt()
        width = wavenumber[wavenumber > 0].min()
        shell = torch.round(wavenumber / width).long()
        return torch.arange(int(shell.max()) + 1, dtype=torch.float64) * width, shell

    def complete_wavenumber(self) -> float:
        """Largest wavenumber whose shell the basis fills; beyond it are corners of the band.

        The cosine at the Nyquist wavenumber of an even grid has no sine beside it and does not
        count.
        """
        return float(self.eigenvalues.max().sqrt())

    def power(self, x: Float[Tensor, "*batch H W"]) -> Float[Tensor, "*batch S"]:
        """Variance of a field in each shell of :meth:`shells`; sums to the domain mean square."""
        _, shell = self.shells()
        square = self.analyze(x).square()
        power = square.new_zeros(*square.shape[:-1], int(shell.max()) + 1)
        return power.index_add(-1, shell.to(square.device), square)

    # ---- means over cells -----------------------------------------------------------------------

    def cell_means(
        self, shape: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "A K"], Float[Tensor, "A K"]]:
        """Functions that look alike in means over cells of a grid, and what is left of each.

        A cell is centred on its point. Its mean of a function is the function's value there times
        a response below one. On the grid, functions beyond its band look like those of the band.

        Args:
            shape: Grid of the cells (the default grid if None).

        Returns:
            Eigenvalues of the functions that look like each one, and their responses: first the
            function itself, then those just beyond the band.

        Raises:
            InputError: On a domain where means over cells mix functions.
        """
        raise InputError(
            f"means over cells of {type(self).__name__} have no response mode by mode; take values "
            "at points there"
        )

    def cell_mean_response(self, shape: Sequence[int] | None = None) -> Float[Tensor, " K"]:
        """Mean of each function over a cell of a grid, over its value at the centre.

        Raises:
            InputError: On a domain where means over cells mix functions.
        """
        return self.cell_means(shape)[1][0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, modes={self.modes})"


class _BoxBasis(Basis):
    """Products of one-dimensional functions on a rectangle ``lengths[0] x lengths[1]``."""

    def __init__(
        self,
        shape: Sequence[int],
        lengths: Sequence[float] = (1.0, 1.0),
        modes: int | Sequence[int] | None = None,
    ) -> None:
        shape = as_pair(shape, "shape")
        self.lengths = (float(lengths[0]), float(lengths[1]))
        if min(self.lengths) <= 0 or not all(math.isfinite(length) for length in self.lengths):
            raise InputError(f"lengths must be positive, got {self.lengths}")
        wanted = shape if modes is None else as_pair(modes, "modes")
        if wanted[0] > shape[0] or wanted[1] > shape[1]:
            raise InputError(f"modes {wanted} exceed the band of the grid {shape}")
        super().__init__(shape, wanted)

    @staticmethod
    @abstractmethod
    def _functions(points: int, modes: int) -> Array:
        """One-dimensional functions on the grid, ``(points, modes)``."""

    @staticmethod
    @abstractmethod
    def _wavenumbers(modes: int) -> Array:
        """Angular wavenumber of each one-dimensional function on the unit interval."""

    def cell_means(
        self, shape: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "A K"], Float[Tensor, "A K"]]:
        r"""See :class:`Basis`; the response is :math:`\mathrm{sinc}` along each axis.

        Along an axis of ``N`` points, wavenumbers that differ by :math:`2 \pi N` look the same.
        Along an even axis of the torus the last cosine has no sine beside it, and the waves of
        both signs look like it.
        """
        shape = self.shape if shape is None else as_pair(shape, "shape")
        axes = []
        for points, modes, length in zip(shape, self.modes, self.lengths, strict=True):
            wave = self._wavenumbers(modes) + 2 * np.pi * points * np.array([0, -1, 1])[:, None]
            axes.append(((wave / length) ** 2, np.sinc(wave / (2 * np.pi * points))))
        (rows, row_response), (columns, column_response) = axes
        eigenvalues = rows[:, None, :, None] + columns[None, :, None, :]
        response = row_response[:, None, :, None] * column_response[None, :, None, :]
        size = (len(rows) * len(columns), self.size)
        return (
            torch.from_numpy(eigenvalues.reshape(size)),
            torch.from_numpy(response.reshape(size)),
        )

    def _spectrum(self) -> tuple[Array, Array]:
        first = self._wavenumbers(self.modes[0]) / self.lengths[0]
        second = self._wavenumbers(self.modes[1]) / self.lengths[1]
        indices = np.stack(np.meshgrid(*map(np.arange, self.modes), indexing="ij"), -1)
        return indices.reshape(-1, 2), (first[:, None] ** 2 + second**2).reshape(-1)

    def _columns(self, width: int) -> Array:
        return self._functions(width, self.modes[1])

    def _rows(self, height: int) -> Array:
        return self._functions(height, self.modes[0])

    def weights(self, shape: Sequence[int] | None = None) -> Float[Tensor, "H W"]:
        """Uniform weights ``1 / (H W)``."""
        shape = self.shape if shape is None else as_pair(shape, "shape")
        return torch.full(shape, 1.0 / (shape[0] * shape[1]), dtype=torch.float64)

    def at(self, shape: Sequence[int]) -> Self:
        """The same family and domain on another grid (see :class:`Basis`)."""
        shape = as_pair(shape, "shape")
        if self.modes == self.shape:
            return type(self)(shape, self.lengths)
        modes = min(self.modes[0], shape[0]), min(self.modes[1], shape[1])
        return type(self)(shape, self.lengths, modes)

    def complete_wavenumber(self) -> float:
        """See :class:`Basis`."""
        wavenumber = self.eigenvalues.sqrt()
        ends = []
        for axis in (0, 1):
            along = wavenumber[self.indices[:, 1 - axis] == 0]
            ends.append(float(along[: self._paired(len(along))].max()))
        return min(ends)

    @staticmethod
    def _paired(modes: int) -> int:
        """Number of the first functions along an axis that are there with all of their kind."""
        return modes

    def truncate(self, modes: int | Sequence[int]) -> Self:
        """Keep the ``modes`` slowest functions of each axis."""
        wanted = as_pair(modes, "modes")
        kept = min(wanted[0], self.modes[0]), min(wanted[1], self.modes[1])
        return type(self)(self.shape, self.lengths, kept)

    def resolves(self, shape: Sequence[int]) -> bool:
        """Whether there are at least as many points as functions along each axis."""
        return shape[0] >= self.modes[0] and shape[1] >= self.modes[1]


class FourierBasis(_BoxBasis):
    r"""Periodic functions on a torus: products of :math:`1, \sqrt2\cos, \sqrt2\sin`.

    Grid points stand at :math:`j L / N`, so a grid twice as fine holds every point of the coarse
    one. Functions are ordered ``1, cos 1, sin 1, cos 2, sin 2, ...``; an even grid ends on the
    cosine of its Nyquist wavenumber, whose amplitude is 1 so that it is normal on that grid.

    Args:
        shape: Grid ``(H, W)``.
        lengths: Extent of the domain along rows and columns, in the units that length scales use.
        modes: Functions kept along each axis; all that the grid resolves if None.
    """

    @staticmethod
    def _functions(points: int, modes: int) -> Array:
        angle = 2 * np.pi * np.arange(points)[:, None] / points
        wavenumber = (np.arange(modes) + 1) // 2
        cosine = np.arange(modes) % 2 == 1
        values = np.sqrt(2) * np.where(
            cosine, np.cos(angle * wavenumber), np.sin(angle * wavenumber)
        )
        values[:, 0] = 1.0
        if modes % 2 == 0:
            values[:, -1] /= np.sqrt(2)
        return values

    @staticmethod
    def _wavenumbers(modes: int) -> Array:
        return 2 * np.pi * ((np.arange(modes) + 1) // 2)

    @staticmethod
    def _paired(modes: int) -> int:
        return modes if modes % 2 else modes - 1

    def symmetry(self) -> Tensor:
        """Sines and cosines of one pair of wavenumbers."""
        return torch.unique((self.indices + 1) // 2, dim=0, return_inverse=True)[1]


class CosineBasis(_BoxBasis):
    r"""Functions on a box that need not be periodic: products of :math:`\sqrt2\cos(\pi k x)`.

    The eigenfunctions of the Laplacian with no flux through the border, on cell centres
    :math:`(j + 1/2) L / N` (the DCT-II). A random field with independent coefficients has unit
    variance in the mean; at the border it is larger, since the field is mirrored there.

    Args:
        shape: Grid ``(H, W)``.
        lengths: Extent of the domain along rows and columns, in the units that length scales use.
        modes: Functions kept along each axis; all that the grid resolves if None.
    """

    @staticmethod
    def _functions(points: int, modes: int) -> Array:
        angle = np.pi * (np.arange(points)[:, None] + 0.5) / points
        values = np.sqrt(2) * np.cos(angle * np.arange(modes))
        values[:, 0] = 1.0
        return values

    @staticmethod
    def _wavenumbers(modes: int) -> Array:
        return np.pi * np.arange(modes)

    def symmetry(self) -> Tensor:
        """Every function stands alone."""
        return torch.arange(self.size)


def _to_modes(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    """``(..., H, W)`` to ``(..., K1, K2)``; rows of three axes hold a matrix for each column."""
    y = x @ columns.mT
    return rows @ y if rows.ndim == 2 else torch.einsum("jkh,...hj->...kj", rows, y)


def _to_grid(rows: Tensor, columns: Tensor, c: Tensor) -> Tensor:
    """``(..., K1, K2)`` to ``(..., H, W)``."""
    y = rows @ c if rows.ndim == 2 else torch.einsum("jhk,...kj->...hj", rows, c)
    return y @ columns.mT


def _multiplied(
    product: Callable[..., Tensor],
    transpose: Callable[..., Tensor],
    rows: Tensor,
    columns: Tensor,
    x: Tensor,
    rounded: bool,
) -> Tensor:
    """One of the two products; rounded if that is allowed and something is gained."""
    if not (rounded and _rounding_gains(x)):
        return product(rows, columns, x)
    return Rounded.apply(
        x, partial(product, rows, columns), partial(transpose, rows.mT, columns.mT)
    )


def _rounding_gains(x: Tensor) -> bool:
    """Whether rounded products are quicker. Compilers cannot look into them."""
    return x.is_cuda and not torch.compiler.is_compiling()
