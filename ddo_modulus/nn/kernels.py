# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the neural operator, which a GPU's memory keeps waiting.

Axes: ``B`` batch, ``P = H W`` points (row by row), ``C`` channels of a field, ``N`` hidden ones,
``D`` channels in front, ``K Q`` modes.

A kernel reads a field once and writes one once; what lies between (neighbours, the synthesis of a
filter, sums before and after a nonlinearity) stays in registers. Operands of products have the type
of the fields, sums are in float32. A *line* is a row of the grid, ``lines`` of ``points`` each. The
first product of an analysis and the last of a synthesis are along it, with ``K`` modes; the others
are across the lines, with ``Q``.

Weights are kept by programs that go through many *tiles* of points one after the other: they would
otherwise be most of what is read. A tile is a part of a line, with the last product of a synthesis
in it; where lines are short it is any points, and the synthesis is done before.

Sizes that end in ``_`` are those of the arrays in registers: powers of two from 16 up, or multiples
of ``J_``; what is beyond the true ones is zero. A tensor cannot be sliced there, so the channels of
which neighbours are seen (``L``, the *near* ones) are kept apart from the rest, the *far* ones.
"""

# Triton takes the types of arguments from the call, and asks for `tl.constexpr` as what they are.
# ruff: noqa: ANN001, ANN202, E741
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

_EPS = tl.constexpr(1e-5)  # of torch's layer_norm
_HARDWARE = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _load(field, place, inside, first, channel, width, size):
    """Channels from ``first`` on, ``width`` of them, at some places of a field ``(P, size)``."""
    known = inside[:, None] & (channel < width)[None, :]
    return tl.load(field + place[:, None] * size + (first + channel)[None, :], mask=known, other=0)


@triton.jit
def _store(field, x, place, inside, first, channel, width, size):
    """Write what :func:`_load` reads."""
    known = inside[:, None] & (channel < width)[None, :]
    where = field + place[:, None] * size + (first + channel)[None, :]
    tl.store(where, x.to(field.dtype.element_ty), mask=known)


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
    """``1 / (1 + exp(-x))``, within half precision."""
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
def _rows(weight, column, i: tl.constexpr, C_: tl.constexpr, J_: tl.constexpr):
    """A piece of a weight ``(N_, C_)``: ``J_`` rows."""
    return tl.load(weight + (i * J_ + tl.arange(0, J_))[:, None] * C_ + column[None, :])


@triton.jit
def _tile(tile, points, lines, batch, M: tl.constexpr, LINED: tl.constexpr):
    """Points of a tile: a part of a line, or any.

    Returns:
        The line (of all states'), where along it, whether there; the state of the first point, the
        points counted from its beginning, and how many of them are of states before.
    """
    P = points * lines
    if LINED:
        parts = tl.cdiv(points, M)
        line, along = tile // parts, (tile % parts) * M + tl.arange(0, M)
        state, inside = line // lines, along < points
        place = (line % lines) * points + along
        before = tl.zeros((M,), tl.int32)
    else:
        line, along = 0, tl.arange(0, M)
        start = tl.cast(tile, tl.int64) * M
        state = tl.cast(start // P, tl.int32)
        place = (start - tl.cast(state, tl.int64) * P).to(tl.int32) + along
        before = place // P
        inside = state + before < batch
        before *= P
    return line, along, inside, tl.cast(state, tl.int64), place, before


@triton.jit
def _synthesis(
    sums, matrix, modes, along, inside, channel, width, k_stride, K: tl.constexpr, K_: tl.constexpr
):
    """Add the last product of a synthesis, that along a line: ``matrix @ modes``."""
    for first in tl.static_range(0, K, K_):
        k = first + tl.arange(0, K_)
        s = _load(matrix, along, inside, 0, k, K, K)
        known = (k < K)[:, None] & (channel < width)[None, :]
        c = tl.load(modes + k[:, None] * k_stride + channel[None, :], mask=known, other=0)
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
    modes, analysis, weight, mix, synthesis, out, batch, lines, page, k_stride, line_stride,
    K: tl.constexpr, C: tl.constexpr, C_: tl.constexpr,
    N: tl.constexpr, N_: tl.constexpr, J_: tl.constexpr,
    Q: tl.constexpr, Q_: tl.constexpr, M: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Second product of an analysis, a filter and a map of the channels, first of a synthesis.

    From ``(B, K, lines, C)`` to ``N`` channels by way of ``Q`` modes across the lines, whose
    matrices are of one page for each mode along them, or of one for all (``page`` zero). The filter
    comes first, or after the map (in the derivative).
    """
    channel, q, j = tl.arange(0, C_), tl.arange(0, Q_), tl.arange(0, J_)
    kept = ()
    for i in tl.static_range(N_ // J_):
        kept = kept + (_columns(mix, channel, i, N_, J_),)  # noqa: RUF005 - Triton unpacks nothing
    for item in range(tl.program_id(0), batch * K, tl.num_programs(0)):
        k, state = item % K, tl.cast(item // K, tl.int64)
        source = modes + tl.cast(item, tl.int64) * lines * C
        target = out + state * lines * K * N + k * k_stride
        c = tl.zeros((Q_, C_), tl.float32)
        for first in range(0, lines, M):
            line = first + tl.arange(0, M)
            w = _load(analysis + k * page, q, q < Q, 0, line, lines, lines)
            x = _load(source, line, line < lines, 0, channel, C, C)
            c = tl.dot(w, x, c, input_precision="ieee")
        if FIRST:
            c *= _load(weight + k * Q * C, q, q < Q, 0, channel, C, C).to(tl.float32)
        a = c.to(out.dtype.element_ty)
        for i in tl.static_range(N_ // J_):
            d = tl.dot(a, kept[i], input_precision="ieee")
            if not FIRST:
                d *= _load(weight + k * Q * N, q, q < Q, i * J_, j, N - i * J_, N).to(tl.float32)
            e = d.to(out.dtype.element_ty)
            for first in range(0, lines, M):
                line = first + tl.arange(0, M)
                s = _load(synthesis + k * page, line, line < lines, 0, q, Q, Q)
                y = tl.dot(s, e, input_precision="ieee").to(out.dtype.element_ty)
                known = (line < lines)[:, None] & (i * J_ + j < N)[None, :]
                tl.store(target + line[:, None] * line_stride + (i * J_ + j)[None, :], y, known)


@triton.jit
def block(
    h, y, modes, synthesis, table, weight, bias, w_out, b_out, mixed, out,
    tiles, batch, points, lines, C: tl.constexpr, C_: tl.constexpr, L: tl.constexpr,
    S_: tl.constexpr, N: tl.constexpr, N_: tl.constexpr, J_: tl.constexpr,
    K: tl.constexpr, K_: tl.constexpr, M: tl.constexpr, LINED: tl.constexpr, KEPT: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """``out = h + W2 silu(mixed) + b2`` with ``mixed = W1 [y, neighbours of y] + b1 + filtered``.

    ``filtered`` is the synthesis of ``modes``; where tiles are no lines, they are it themselves.
    ``mixed`` is written where it is wanted: the derivative starts from it.
    """
    P, R = points * lines, C - L
    channel, s, j = tl.arange(0, C_), tl.arange(0, S_), tl.arange(0, J_)
    size: tl.constexpr = S_ * N_
    kept = ()
    if KEPT:
        for i in tl.static_range(N_ // J_):
            for part in tl.static_range(6):
                piece = _columns(weight + part * size, s, i, N_, J_)
                kept = kept + (piece,)  # noqa: RUF005
            kept = kept + (_rows(w_out, channel, i, C_, J_),)  # noqa: RUF005
    out_b = _row(b_out, channel, C)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        line, along, inside, state, place, before = _tile(tile, points, lines, batch, M, LINED)
        spot = table + place - before
        field = y + state * P * C
        near, far = _load(field, place, inside, 0, s, L, C), _load(field, place, inside, L, s, R, C)
        seen = (near, far)
        for side in tl.static_range(4):
            there = before + tl.load(spot + side * P, inside, 0)
            seen = seen + (_load(field, there, inside, 0, s, L, C),)  # noqa: RUF005
        total = tl.zeros((M, C_), tl.float32)
        for i in tl.static_range(N_ // J_):
            x = tl.zeros((M, J_), tl.float32)
            for part in tl.static_range(6):
                if KEPT:
                    w = kept[7 * i + part]
                else:
                    w = _columns(weight + part * size, s, i, N_, J_)
                x = tl.dot(seen[part], w, x, input_precision="ieee")
            if LINED:
                there = modes + state * K * lines * N + (line % lines) * N + i * J_
                x = _synthesis(
                    x, synthesis, there, along, inside, j, N - i * J_, lines * N, K, K_
                )
            else:
                there = modes + state * P * N
                x += _load(there, place, inside, i * J_, j, N - i * J_, N).to(tl.float32)
            x += _row(bias + i * J_, j, N_)
            if KEEP:
                _store(mixed + state * P * N, x, place, inside, i * J_, j, N - i * J_, N)
            x = (x * _logistic(x)).to(w_out.dtype.element_ty)
            if KEPT:
                back = kept[7 * i + 6]
            else:
                back = _rows(w_out, channel, i, C_, J_)
            total = tl.dot(x, back, total, input_precision="ieee")
        rest = _load(h + state * P * C, place, inside, 0, channel, C, C).to(tl.float32)
        _store(out + state * P * C, total + out_b + rest, place, inside, 0, channel, C, C)


@triton.jit
def gate_backward(
    g, mixed, w_out, matrix, out, modes, batch, points, lines, C: tl.constexpr, C_: tl.constexpr,
    N: tl.constexpr, N_: tl.constexpr, J_: tl.constexpr, K: tl.constexpr, Q_: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Gradient by ``mixed`` from that by the block: ``(W2^T g) silu'(mixed)``.

    And the first product of the transpose of the synthesis, as in :func:`normalise`.
    """
    channel, q, j = tl.arange(0, C_), tl.arange(0, Q_), tl.arange(0, J_)
    kept = ()
    for i in tl.static_range(N_ // J_):
        kept = kept + (_columns(w_out, channel, i, N_, J_),)  # noqa: RUF005
    for line in range(tl.program_id(0), batch * lines, tl.num_programs(0)):
        begin = tl.cast(line, tl.int64) * points
        sums = ()
        for i in tl.static_range(N_ // J_):
            sums = sums + (tl.zeros((Q_, J_), tl.float32),)  # noqa: RUF005
        for first in range(0, points, M):
            along = first + tl.arange(0, M)
            inside, more = along < points, ()
            up = _load(g + begin * C, along, inside, 0, channel, C, C)
            w = _load(matrix, q, q < K, 0, along, points, points)
            for i in tl.static_range(N_ // J_):
                m = _load(mixed + begin * N, along, inside, i * J_, j, N - i * J_, N).to(tl.float32)
                s = _logistic(m)
                x = tl.dot(up, kept[i], input_precision="ieee") * (s + m * (s - s * s))
                x = x.to(out.dtype.element_ty)
                _store(out + begin * N, x, along, inside, i * J_, j, N - i * J_, N)
                more = more + (tl.dot(w, x, sums[i], input_precision="ieee"),)  # noqa: RUF005
            sums = more
        there = modes + tl.cast(line // lines, tl.int64) * K * lines * N
        for i in tl.static_range(N_ // J_):
            place = q * lines + line % lines
            _store(there, sums[i], place, q < K, i * J_, j, N - i * J_, N)


@triton.jit
def block_backward(
    g, g_mixed, h, factor, modes, analysis, sources, weight, out,
    tiles, batch, points, lines, row_stride, C: tl.constexpr, L: tl.constexpr, S_: tl.constexpr,
    N: tl.constexpr, N_: tl.constexpr, J_: tl.constexpr, K: tl.constexpr, K_: tl.constexpr,
    M: tl.constexpr, LINED: tl.constexpr, KEPT: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradient by ``h`` from those by the block (``g``) and by ``mixed``.

    ``modes`` are the gradients by the coefficients, but for the last product, that of ``analysis``;
    with it where tiles are no lines. ``sources`` are who sees a point as its neighbour.
    """
    P, R = points * lines, C - L
    s, j = tl.arange(0, S_), tl.arange(0, J_)
    size: tl.constexpr = S_ * N_
    kept = ()
    if KEPT:
        for i in tl.static_range(N_ // J_):
            for part in tl.static_range(6):
                kept = kept + (_rows(weight + part * size, s, i, S_, J_),)  # noqa: RUF005
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        line, along, inside, state, place, before = _tile(tile, points, lines, batch, M, LINED)
        field = g_mixed + state * P * N
        near, far = tl.zeros((M, S_), tl.float32), tl.zeros((M, S_), tl.float32)
        for i in tl.static_range(N_ // J_):
            for part in tl.static_range(6):
                if KEPT:
                    w = kept[6 * i + part]
                else:
                    w = _rows(weight + part * size, s, i, S_, J_)
                if part < 2:
                    x = _load(field, place, inside, i * J_, j, N - i * J_, N)
                else:
                    there = sources + (part - 2) * P + place - before
                    source = tl.load(there, inside, -1)
                    x = _load(field, before + source, source >= 0, i * J_, j, N - i * J_, N)
                    if PAIRS:
                        source = tl.load(there + 4 * P, inside, -1)
                        x += _load(field, before + source, source >= 0, i * J_, j, N - i * J_, N)
                if part == 1:
                    far = tl.dot(x, w, far, input_precision="ieee")
                else:
                    near = tl.dot(x, w, near, input_precision="ieee")
        if LINED:
            there = modes + state * K * lines * C + (line % lines) * C
            near = _synthesis(near, analysis, there, along, inside, s, L, lines * C, K, K_)
            far = _synthesis(far, analysis, there + L, along, inside, s, R, lines * C, K, K_)
            near *= _row(factor + state * row_stride, s, L)
            far *= _row(factor + state * row_stride + L, s, R)
        else:
            there = modes + state * P * C
            near += _load(there, place, inside, 0, s, L, C).to(tl.float32)
            far += _load(there, place, inside, L, s, R, C).to(tl.float32)
            there = factor + state * row_stride
            near *= _load(there, before // P, inside, 0, s, L, row_stride)
            far *= _load(there, before // P, inside, L, s, R, row_stride)
        # Back through the normalisation over all channels.
        field = h + state * P * C
        x = _load(field, place, inside, 0, s, L, C).to(tl.float32)
        z = _load(field, place, inside, L, s, R, C).to(tl.float32)
        mean = ((tl.sum(x, 1) + tl.sum(z, 1)) / C)[:, None]
        x = tl.where((s < L)[None, :], x - mean, 0.0)
        z = tl.where((s < R)[None, :], z - mean, 0.0)
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(z * z, 1)) / C + _EPS)[:, None]
        x, z = x * scale, z * scale
        mean = ((tl.sum(near, 1) + tl.sum(far, 1)) / C)[:, None]
        slope = ((tl.sum(near * x, 1) + tl.sum(far * z, 1)) / C)[:, None]
        near, far = (near - mean - x * slope) * scale, (far - mean - z * slope) * scale
        field = g + state * P * C
        near += _load(field, place, inside, 0, s, L, C).to(tl.float32)
        far += _load(field, place, inside, L, s, R, C).to(tl.float32)
        _store(out + state * P * C, near, place, inside, 0, s, L, C)
        _store(out + state * P * C, far, place, inside, L, s, R, C)


@triton.jit
def add_synthesis(
    field, modes, synthesis, out, tiles, batch, points, lines, k_stride, line_stride, batch_stride,
    C: tl.constexpr, C_: tl.constexpr, K: tl.constexpr, K_: tl.constexpr, M: tl.constexpr,
    LINED: tl.constexpr,
):  # fmt: skip
    """``out = field + synthesis``."""
    P, channel = points * lines, tl.arange(0, C_)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        line, along, inside, state, place, _ = _tile(tile, points, lines, batch, M, LINED)
        there = modes + state * batch_stride + (line % lines) * line_stride
        x = tl.zeros((M, C_), tl.float32)
        x = _synthesis(x, synthesis, there, along, inside, channel, C, k_stride, K, K_)
        x += _load(field + state * P * C, place, inside, 0, channel, C, C).to(tl.float32)
        _store(out + state * P * C, x, place, inside, 0, channel, C, C)


@triton.jit
def _load_front(field, place, channel, P, width: tl.constexpr):
    """Places of a field ``(width, P)``, channels behind."""
    known = (place < P)[:, None] & (channel < width)[None, :]
    return tl.load(field + channel[None, :] * P + place[:, None], mask=known, other=0)


@triton.jit
def lift(
    x, weight, bias, h, P, D: tl.constexpr, D_: tl.constexpr, C: tl.constexpr, C_: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """``h = W x + b``: a field with its ``D`` channels in front to one with ``C`` behind."""
    batch = tl.program_id(1).to(tl.int64)
    place, channel = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, C_)
    d = tl.arange(0, D_)
    f = _load_front(x + batch * P * D, place, d, P, D).to(weight.dtype.element_ty)
    w = tl.load(weight + d[:, None] * C_ + channel[None, :])
    out = tl.dot(f, w, input_precision="ieee") + _row(bias, channel, C)
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
    known = (place < P)[:, None] & (d < D)[None, :]
    tl.store(out + batch * P * D + d[None, :] * P + place[:, None], y, mask=known)


@triton.jit
def project_backward(
    g, h, weight, out, P, D: tl.constexpr, D_: tl.constexpr, C: tl.constexpr, C_: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Gradient by ``h`` of the projection of its normalised values."""
    batch = tl.program_id(1).to(tl.int64)
    place, channel = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, C_)
    d = tl.arange(0, D_)
    f = _load_front(g + batch * P * D, place, d, P, D).to(weight.dtype.element_ty)
    up = tl.dot(f, tl.load(weight + d[:, None] * C_ + channel[None, :]), input_precision="ieee")
    x = _load(h + batch * P * C, place, place < P, 0, channel, C, C).to(tl.float32)
    x, scale = _standard(x, channel, C)
    up = (up - (tl.sum(up, 1) / C)[:, None] - x * (tl.sum(up * x, 1) / C)[:, None]) * scale
    _store(out + batch * P * C, up, place, place < P, 0, channel, C, C)
