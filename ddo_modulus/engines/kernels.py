# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the neural operator, which the bandwidth of a GPU's memory limits.

Axes: ``B`` batch, ``P = H W`` points (row by row), ``C`` channels of a field, ``N`` hidden ones,
``D`` channels in front, ``K Q`` modes.

A kernel has a field from the GPU's memory once and writes one once (neighbours come from its
caches); what lies between, the synthesis of a filter and sums before and after a nonlinearity,
stays in registers. Operands of products have the type of the fields, sums are in float32. A *line*
is a row of the grid, ``lines`` of ``points`` each. The first product of an analysis and the last of
a synthesis are along it, with ``K`` modes; the others are across the lines, with ``Q``.

Sizes that end in ``_`` are those of arrays in registers, powers of two from 16 up; what is beyond
the true ones is zero. ``J_`` and ``K_`` are pieces of hidden channels and of modes, ``N_`` is a
multiple of ``J_``, ``Q_`` holds all modes of either kind. A tensor cannot be sliced there, so the
channels of which neighbours are seen (``L``, the *near* ones) are kept apart from the *far* ones.
"""

# Triton takes the types of arguments from the call, and asks for `tl.constexpr` as what they are.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

_EPS = tl.constexpr(1e-5)  # of torch's layer_norm
_HARDWARE = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _load(field, place, inside, first, channel, width, size):
    """Channels from ``first`` on, ``width`` of them, at some places of a field ``(P, size)``."""
    valid = inside[:, None] & (channel < width)[None, :]
    return tl.load(field + place[:, None] * size + (first + channel)[None, :], mask=valid, other=0)


@triton.jit
def _store(field, x, place, inside, first, channel, width, size):
    """Write what :func:`_load` reads."""
    valid = inside[:, None] & (channel < width)[None, :]
    where = field + place[:, None] * size + (first + channel)[None, :]
    tl.store(where, x.to(field.dtype.element_ty), mask=valid)


@triton.jit
def _row(values, channel, width: tl.constexpr):
    """A number for each channel, as a row."""
    return tl.load(values + channel, mask=channel < width, other=0).to(tl.float32)[None, :]


@triton.jit
def _standard(x, channel, size: tl.constexpr):
    """Values of zero mean and unit variance over the channels; the factor that made them so."""
    x = tl.where((channel < size)[None, :], x - (tl.sum(x, 1) / size)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1) / size + _EPS)[:, None]
    return x * scale, scale


@triton.jit
def _logistic(x):
    """``1 / (1 + exp(-x))``, on a GPU to about ``2**-12``."""
    if _HARDWARE:
        tanh: tl.constexpr = "tanh.approx.f32 $0, $1;"
        x = tl.inline_asm_elementwise(tanh, "=f,f", [0.5 * x], tl.float32, is_pure=True, pack=1)
        return 0.5 * x + 0.5
    else:
        return tl.sigmoid(x)


@triton.jit
def _columns(weight, row, i: tl.constexpr, N_: tl.constexpr, J_: tl.constexpr):
    """A piece of a weight ``(rows, N_)``: ``J_`` columns."""
    return tl.load(weight + row[:, None] * N_ + (i * J_ + tl.arange(0, J_))[None, :])


@triton.jit
def _rows(weight, column, i, C_: tl.constexpr, J_: tl.constexpr):
    """A piece of a weight ``(N_, C_)``: ``J_`` rows."""
    return tl.load(weight + (i * J_ + tl.arange(0, J_))[:, None] * C_ + column[None, :])


@triton.jit
def _tile(points, P, M: tl.constexpr):
    """Points of this program, whether they are there, their lines and where along those."""
    place = tl.program_id(0) * M + tl.arange(0, M)
    return place, place < P, place // points, place % points


@triton.jit
def _synthesis(
    sums, matrix, modes, line, along, inside, channel, width, points, lines, k_stride, line_stride,
    K: tl.constexpr, K_: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Add the last product of a synthesis, that along lines: ``matrix @ modes`` of each.

    ``LINES`` are those that a tile may have points of.
    """
    begin = tl.program_id(0) * line.shape[0] // points
    for i in range(LINES * ((K + K_ - 1) // K_)):
        k, this = (i // LINES) * K_ + tl.arange(0, K_), begin + i % LINES
        s = _load(matrix, along, inside & (line == this), 0, k, K, K)
        # Of lines beyond the last, of which no point is there, something is read all the same.
        there = modes + tl.minimum(this, lines - 1) * line_stride
        valid = (k < K)[:, None] & (channel < width)[None, :]
        c = tl.load(there + k[:, None] * k_stride + channel[None, :], mask=valid, other=0)
        sums = tl.dot(s, c, sums, input_precision="ieee")
    return sums


@triton.jit
def normalise(
    h, factor, shift, matrix, y, modes, points, lines, row_stride,
    C: tl.constexpr, C_: tl.constexpr, K: tl.constexpr, Q_: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """``y = norm(h) * factor + shift``, and the first product of its analysis, along a line.

    Factor and shift are of a state and channel; the modes are ``(B, K, lines, C)``.
    """
    batch, line, P = tl.program_id(1).to(tl.int64), tl.program_id(0), points * lines
    channel, q = tl.arange(0, C_), tl.arange(0, Q_)
    h, y = h + batch * P * C, y + batch * P * C
    a = _row(factor + batch * row_stride, channel, C)
    b = _row(shift + batch * row_stride, channel, C)
    sums = tl.zeros((Q_, C_), tl.float32)
    for first in range(0, points, M):
        along = first + tl.arange(0, M)
        place = line * points + along
        x = _load(h, place, along < points, 0, channel, C, C).to(tl.float32)
        x = (_standard(x, channel, C)[0] * a + b).to(y.dtype.element_ty)
        _store(y, x, place, along < points, 0, channel, C, C)
        w = _load(matrix, q, q < K, 0, along, points, points)
        # What is beyond the line is a shift, and meets a zero of the matrix.
        sums = tl.dot(w, x, sums, input_precision="ieee")
    _store(modes + batch * K * lines * C, sums, q * lines + line, q < K, 0, channel, C, C)


@triton.jit
def filtered(
    modes, analysis, weight, mix, synthesis, out, lines, page,
    K: tl.constexpr, C: tl.constexpr, C_: tl.constexpr, D: tl.constexpr, D_: tl.constexpr,
    Q: tl.constexpr, Q_: tl.constexpr, M: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Second product of an analysis, a filter and a map of the channels, first of a synthesis.

    From ``(B, K, lines, C)`` to ``(B, K, lines, D)`` by way of ``Q`` modes across the lines, whose
    matrices are of one page for each mode along them, or of one for all (``page`` zero). The filter
    comes first, or after the map (in the derivative).
    """
    k, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel, d, q = tl.arange(0, C_), tl.arange(0, D_), tl.arange(0, Q_)
    modes, out = modes + (batch * K + k) * lines * C, out + (batch * K + k) * lines * D
    analysis, synthesis = analysis + k * page, synthesis + k * page
    c = tl.zeros((Q_, C_), tl.float32)
    for first in range(0, lines, M):
        line = first + tl.arange(0, M)
        x = _load(modes, line, line < lines, 0, channel, C, C)
        c = tl.dot(_load(analysis, q, q < Q, 0, line, lines, lines), x, c, input_precision="ieee")
    if FIRST:
        c *= _load(weight + k * Q * C, q, q < Q, 0, channel, C, C).to(tl.float32)
    w = tl.load(mix + channel[:, None] * D_ + d[None, :])
    c = tl.dot(c.to(w.dtype), w, input_precision="ieee")
    if not FIRST:
        c *= _load(weight + k * Q * D, q, q < Q, 0, d, D, D).to(tl.float32)
    c = c.to(w.dtype)
    for first in range(0, lines, M):
        line = first + tl.arange(0, M)
        s = _load(synthesis, line, line < lines, 0, q, Q, Q)
        x = tl.dot(s, c, input_precision="ieee")
        _store(out, x, line, line < lines, 0, d, D, D)


@triton.jit
def block(
    h, y, modes, synthesis, seen, weight, bias, w_out, b_out, mixed, out, points, lines,
    C: tl.constexpr, C_: tl.constexpr, L: tl.constexpr, S_: tl.constexpr,
    N: tl.constexpr, N_: tl.constexpr, J_: tl.constexpr, K: tl.constexpr, K_: tl.constexpr,
    LINES: tl.constexpr, M: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """``out = h + W2 silu(mixed) + b2`` with ``mixed = W1 [y, neighbours of y] + b1 + filtered``.

    ``seen`` are the points whose values are taken: near channels, far ones, those of four
    neighbours. ``filtered`` is the synthesis of ``modes``. ``mixed`` is written where it is wanted:
    the derivative starts from it.
    """
    state, P = tl.program_id(1).to(tl.int64), points * lines
    channel, s, j = tl.arange(0, C_), tl.arange(0, S_), tl.arange(0, J_)
    place, inside, line, along = _tile(points, P, M)
    h, y, out, mixed = (
        h + state * P * C,
        y + state * P * C,
        out + state * P * C,
        mixed + state * P * N,
    )
    modes += state * K * lines * N
    total = tl.zeros((M, C_), tl.float32)
    for i in tl.static_range(N_ // J_):
        x = tl.zeros((M, J_), tl.float32)
        for part in range(6):
            begin, width = tl.where(part == 1, L, 0), tl.where(part == 1, C - L, L)
            there = tl.load(seen + part * P + place, inside, 0)
            a = _load(y, there, inside, begin, s, width, C)
            w = _columns(weight + part * S_ * N_, s, i, N_, J_)
            x = tl.dot(a, w, x, input_precision="ieee")
        x = _synthesis(
            x, synthesis, modes + i * J_, line, along, inside, j, N - i * J_, points, lines,
            lines * N, N, K, K_, LINES,
        )  # fmt: skip
        x += _row(bias + i * J_, j, N_)
        if KEEP:
            _store(mixed, x, place, inside, i * J_, j, N - i * J_, N)
        x = (x * _logistic(x)).to(w_out.dtype.element_ty)
        total = tl.dot(x, _rows(w_out, channel, i, C_, J_), total, input_precision="ieee")
    total += _row(b_out, channel, C)
    total += _load(h, place, inside, 0, channel, C, C).to(tl.float32)
    _store(out, total, place, inside, 0, channel, C, C)


@triton.jit
def gate_backward(
    g, mixed, w_out, matrix, out, modes, points, lines, C: tl.constexpr, C_: tl.constexpr,
    N: tl.constexpr, N_: tl.constexpr, J_: tl.constexpr, K: tl.constexpr, Q_: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Gradient by ``mixed`` from that by the block: ``(W2^T g) silu'(mixed)``.

    And the first product of the transpose of the synthesis, as in :func:`normalise`.
    """
    batch, P, pieces = tl.program_id(1).to(tl.int64), points * lines, tl.cdiv(N, J_)
    line, begin = tl.program_id(0) // pieces, (tl.program_id(0) % pieces) * J_
    channel, q, j = tl.arange(0, C_), tl.arange(0, Q_), tl.arange(0, J_)
    g, mixed, out = g + batch * P * C, mixed + batch * P * N, out + batch * P * N
    w_out = tl.load(w_out + channel[:, None] * N_ + (begin + j)[None, :])
    sums = tl.zeros((Q_, J_), tl.float32)
    for first in range(0, points, M):
        along = first + tl.arange(0, M)
        place, inside = line * points + along, along < points
        m = _load(mixed, place, inside, begin, j, N - begin, N).to(tl.float32)
        s = _logistic(m)
        x = _load(g, place, inside, 0, channel, C, C)
        x = tl.dot(x, w_out, input_precision="ieee") * (s + m * (s - s * s))
        x = x.to(out.dtype.element_ty)
        _store(out, x, place, inside, begin, j, N - begin, N)
        w = _load(matrix, q, q < K, 0, along, points, points)
        sums = tl.dot(w, x, sums, input_precision="ieee")
    modes += batch * K * lines * N
    _store(modes, sums, q * lines + line, q < K, begin, j, N - begin, N)


@triton.jit
def block_backward(
    g, g_mixed, h, factor, modes, analysis, sources, weight, w_far, out, points, lines, row_stride,
    C: tl.constexpr, L: tl.constexpr, S_: tl.constexpr, N: tl.constexpr, J_: tl.constexpr,
    K: tl.constexpr, K_: tl.constexpr, LINES: tl.constexpr, M: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradient by ``h`` from those by the block (``g``) and by ``mixed``.

    ``modes`` are the gradients by the coefficients, but for the last product, that of ``analysis``.
    ``sources`` are the points that see these as themselves and as their four neighbours: one, at
    borders two or none (-1).
    """
    state, P = tl.program_id(1).to(tl.int64), points * lines
    s, j, R, pieces = tl.arange(0, S_), tl.arange(0, J_), C - L, tl.cdiv(N, J_)
    place, inside, line, along = _tile(points, P, M)
    g, h, out = g + state * P * C, h + state * P * C, out + state * P * C
    g_mixed, modes = g_mixed + state * P * N, modes + state * K * lines * C
    near, far = tl.zeros((M, S_), tl.float32), tl.zeros((M, S_), tl.float32)
    for i in range(5 * pieces):
        part, first = i // pieces, (i % pieces) * J_
        source = tl.load(sources + part * P + place, inside, -1)
        x = _load(g_mixed, source, source >= 0, first, j, N - first, N)
        if PAIRS:
            source = tl.load(sources + (5 + part) * P + place, inside, -1)
            x += _load(g_mixed, source, source >= 0, first, j, N - first, N)
        near = tl.dot(x, _rows(weight, s, i, S_, J_), near, input_precision="ieee")
    for i in range(pieces):
        x = _load(g_mixed, place, inside, i * J_, j, N - i * J_, N)
        far = tl.dot(x, _rows(w_far, s, i, S_, J_), far, input_precision="ieee")
    near = _synthesis(
        near, analysis, modes, line, along, inside, s, L, points, lines, lines * C, C, K, K_, LINES
    )
    modes += L
    far = _synthesis(
        far, analysis, modes, line, along, inside, s, R, points, lines, lines * C, C, K, K_, LINES
    )
    near *= _row(factor + state * row_stride, s, L)
    far *= _row(factor + state * row_stride + L, s, R)
    # Back through the normalisation over all channels.
    x = _load(h, place, inside, 0, s, L, C).to(tl.float32)
    z = _load(h, place, inside, L, s, R, C).to(tl.float32)
    mean = ((tl.sum(x, 1) + tl.sum(z, 1)) / C)[:, None]
    x = tl.where((s < L)[None, :], x - mean, 0.0)
    z = tl.where((s < R)[None, :], z - mean, 0.0)
    scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(z * z, 1)) / C + _EPS)[:, None]
    x, z = x * scale, z * scale
    mean = ((tl.sum(near, 1) + tl.sum(far, 1)) / C)[:, None]
    slope = ((tl.sum(near * x, 1) + tl.sum(far * z, 1)) / C)[:, None]
    near = (near - mean - x * slope) * scale + _load(g, place, inside, 0, s, L, C).to(tl.float32)
    far = (far - mean - z * slope) * scale + _load(g, place, inside, L, s, R, C).to(tl.float32)
    _store(out, near, place, inside, 0, s, L, C)
    _store(out, far, place, inside, L, s, R, C)


@triton.jit
def along_lines(
    x, matrix, field, out, points, lines, C: tl.constexpr, C_: tl.constexpr, K: tl.constexpr,
    K_: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """``out = matrix @ x`` of each line, from ``K`` to ``points``, added to a field if asked for.

    ``G`` lines at once, side by side, so that they share what is read of the matrix.
    """
    state, tiles = tl.program_id(1).to(tl.int64), tl.cdiv(points, M)
    place, column = (tl.program_id(0) % tiles) * M + tl.arange(0, M), tl.arange(0, G * C_)
    line, channel = (tl.program_id(0) // tiles) * G + column // C_, column % C_
    inside, valid = place < points, (line < lines) & (channel < C)
    x += state * lines * K * C
    sums = tl.zeros((M, G * C_), tl.float32)
    for first in range(0, K, K_):
        k = first + tl.arange(0, K_)
        a = _load(matrix, place, inside, 0, k, K, K)
        where = (k * C)[:, None] + (line * K * C + channel)[None, :]
        b = tl.load(x + where, mask=(k < K)[:, None] & valid[None, :], other=0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    where = (place * C)[:, None] + (line * points * C + channel)[None, :]
    there = inside[:, None] & valid[None, :]
    if ADD:
        field += state * lines * points * C
        sums += tl.load(field + where, mask=there, other=0).to(tl.float32)
    out += state * lines * points * C
    tl.store(out + where, sums.to(out.dtype.element_ty), mask=there)


@triton.jit
def _from_front(field, weight, place, channel, P, D: tl.constexpr, D_: tl.constexpr, C_):
    """A linear map of a field ``(D, P)`` to ``C_`` channels behind."""
    d = tl.arange(0, D_)
    valid = (place < P)[:, None] & (d < D)[None, :]
    f = tl.load(field + d[None, :] * P + place[:, None], mask=valid, other=0)
    w = tl.load(weight + d[:, None] * C_ + channel[None, :])
    return tl.dot(f.to(weight.dtype.element_ty), w, input_precision="ieee")


@triton.jit
def lift(
    x, weight, bias, h, P, D: tl.constexpr, D_: tl.constexpr, C: tl.constexpr, C_: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """``h = W x + b``: a field with its ``D`` channels in front to one with ``C`` behind."""
    batch = tl.program_id(1).to(tl.int64)
    place, channel = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, C_)
    out = _from_front(x + batch * P * D, weight, place, channel, P, D, D_, C_)
    out += _row(bias, channel, C)
    _store(h + batch * P * C, out, place, place < P, 0, channel, C, C)


@triton.jit
def project(
    h, weight, bias, out, P, D: tl.constexpr, D_: tl.constexpr, C: tl.constexpr, C_: tl.constexpr,
    M: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """``out = W h + b`` with the channels in front again; of the normalised ``h`` if asked for."""
    batch = tl.program_id(1).to(tl.int64)
    place, channel = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, C_)
    d = tl.arange(0, D_)
    x = _load(h + batch * P * C, place, place < P, 0, channel, C, C)
    if NORM:
        x = _standard(x.to(tl.float32), channel, C)[0].to(weight.dtype.element_ty)
    w = tl.load(weight + channel[:, None] * D_ + d[None, :])
    y = tl.dot(x, w, input_precision="ieee") + _row(bias, d, D)
    valid = (place < P)[:, None] & (d < D)[None, :]
    tl.store(out + batch * P * D + d[None, :] * P + place[:, None], y, mask=valid)


@triton.jit
def project_backward(
    g, h, weight, out, P, D: tl.constexpr, D_: tl.constexpr, C: tl.constexpr, C_: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Gradient by ``h`` of the projection of its normalised values."""
    batch = tl.program_id(1).to(tl.int64)
    place, channel = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, C_)
    up = _from_front(g + batch * P * D, weight, place, channel, P, D, D_, C_)
    x = _load(h + batch * P * C, place, place < P, 0, channel, C, C).to(tl.float32)
    x, scale = _standard(x, channel, C)
    up = (up - (tl.sum(up, 1) / C)[:, None] - x * (tl.sum(up * x, 1) / C)[:, None]) * scale
    _store(out + batch * P * C, up, place, place < P, 0, channel, C, C)
