# SPDX-License-Identifier: Apache-2.0
"""Columns of a table: found by name, and their cells read as numbers.

A cell is a number, is empty, or is flawed. Nothing is guessed: a flawed cell is for the caller to
reject with its row. Codes such as -9999, which programs write for an unknown value, count as empty.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from ddo_modulus.errors import InputError
from ddo_modulus.observations.timestamps import MISSING

#: Coordinates along columns and rows of a box, in place of `lon` and `lat`.
BOX = {"lat": "y", "lon": "x"}

# Values that stand for an unknown one; and numbers from which on all do, as 9.97e36 and 1e20 do.
_CODES = frozenset(
    (-99.9, -999.0, -999.9, -9999.0, -9999.9, -99999.0, -99999.9, -32767.0, -32768.0)
    + (999.9, 9999.0, 9999.9, 99999.0, 99999.9, 999999.0)
)
_UNKNOWN_FROM = 1e9

_GROUP = "[ \u00a0\u2009\u202f'’](?=\\d{3})"  # between the thousands of a number
_DIGITS = r"[+-]?\d+"
# A comma that can only be a decimal comma, can only separate thousands, or can be either.
_IS_DECIMAL = (
    rf"{_DIGITS},(\d{{1,2}}|\d{{4,}})|[+-]?(0|\d{{4,}}),\d+|[+-]?\d{{1,3}}(\.\d{{3}})+,\d+"
)
_IS_THOUSANDS = r"[+-]?\d{1,3}(,\d{3})+\.\d*|[+-]?\d{1,3}(,\d{3}){2,}"


def pick_columns(
    frame: pd.DataFrame,
    wanted: Iterable[str],
    required: Sequence[str],
    where: str,
    names: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Pick the columns of a table that are in use, under our names.

    Capitals, blanks and hyphens of a name do not matter.

    Args:
        frame: The table.
        wanted: Our names.
        required: Those that must be there; `y` and `x` may stand for `lat` and `lon`.
        where: Where the table comes from, for the message.
        names: The table's name of a column by ours, where they differ.

    Returns:
        The columns, with `y` and `x` under these names.

    Raises:
        InputError: If a column is missing or there twice, or a name is no column.
    """
    own, ours = [str(name) for name in frame.columns], [*wanted]
    names = _checked_names(names, ours, own, where)
    places = {name: _places(names.get(name, name), own) for name in ours}
    if all(not places.get(name) and _places(box, own) for name, box in BOX.items()):
        places |= {box: _places(box, own) for box in BOX.values()}
        required = tuple(BOX.get(name, name) for name in required)
    for name, found in places.items():
        if len(found) > 1:
            raise InputError(
                f"{where}: {len(found)} columns are called {name}: "
                f"{', '.join(own[i] for i in found)}; keep one of them"
            )
    if missing := [name for name in required if not places[name]]:
        raise InputError(
            f"{where}: no column {', '.join(missing)}; has {', '.join(own)}, needs "
            f"{', '.join(required)}{_hint(missing, own)}"
        )
    return pd.DataFrame({name: frame.iloc[:, at[0]] for name, at in places.items() if at})


def _checked_names(
    names: Mapping[str, str] | None, wanted: Sequence[str], own: Sequence[str], where: str
) -> dict[str, str]:
    if names is None:
        return {}
    if not isinstance(names, Mapping):
        raise InputError(f"columns={names} must be names of columns, e.g. {{time:valid_time}}")
    for ours, theirs in names.items():
        if ours not in wanted:
            near = difflib.get_close_matches(str(ours), wanted, 1) or ["time"]
            raise InputError(
                f"columns={{{ours}:{theirs}}}: {ours} is no column in use; did you mean "
                f"{near[0]}? The first name is ours, the second the table's"
            )
        if not _places(str(theirs), own):
            near = difflib.get_close_matches(str(theirs), own, 1) or list(own)
            raise InputError(
                f"{where}: no column {theirs}, which columns={{{ours}:{theirs}}} names; has "
                f"{', '.join(near)}"
            )
    return {str(ours): str(theirs) for ours, theirs in names.items()}


def _places(name: str, own: Sequence[str]) -> list[int]:
    """Where columns of a name are: spelt just so, or else nearly so."""
    exact = [i for i, other in enumerate(own) if other == name]
    return exact or [i for i, other in enumerate(own) if _plain(other) == _plain(name)]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().strip("\ufeff\"'").lower())


def _hint(missing: Sequence[str], own: Sequence[str]) -> str:
    """The mend for missing columns: the table's nearest names."""
    plain = {_plain(name): name for name in own}
    near = {}
    for name in missing:
        found = difflib.get_close_matches(name, plain, 1, 0.7)
        # A shorter or longer word for the same, as `obs` or `valid_time`.
        found = found or [o for o in plain if name in o or (len(o) > 2 and o in name)]
        if found:
            near[name] = plain[found[0]]
    if not near:
        return ""
    pairs = ",".join(f"{ours}:{theirs}" for ours, theirs in near.items())
    return f"; if the names differ, give columns={{{pairs}}}"


# ---- numbers -------------------------------------------------------------------------------------


def read_numbers(
    columns: Mapping[str, pd.Series], where: str, *, semicolons: bool = False
) -> tuple[dict[str, pd.Series], pd.DataFrame]:
    """Read the cells of columns as numbers.

    Args:
        columns: Numbers or text.
        where: Where they come from, for the message.
        semicolons: Whether semicolons separate the cells, as where commas are decimal commas.

    Returns:
        The numbers in double precision, NaN where a cell is empty or flawed; and which cells are
        flawed.

    Raises:
        InputError: If commas may be decimal commas or separate thousands.
    """
    numbers, flawed, left = {}, {}, {}
    for name, values in columns.items():
        if _is_real(values.dtype):
            number = pd.Series(values.to_numpy(np.float64, na_value=np.nan), values.index)
            numbers[name], flawed[name] = number, pd.Series(False, values.index)
            continue
        text = _text(values)
        number = pd.to_numeric(text, errors="coerce").astype(np.float64)
        flawed[name] = number.isna() & ~text.str.lower().isin(MISSING)
        left[name] = text[flawed[name]]
        numbers[name] = number
    decimal = _decimal_comma(left, where, semicolons)
    for name, text in left.items():
        found = _localised(text, decimal)
        numbers[name] = numbers[name].fillna(found)
        flawed[name].loc[text.index] = found.isna()
    return numbers, pd.DataFrame(flawed)


def _is_real(kind: object) -> bool:
    """Whether values of a type are real numbers; truth values and complex numbers are not."""
    types = pd.api.types
    others = types.is_bool_dtype(kind) or types.is_complex_dtype(kind)  # type: ignore[arg-type]
    return types.is_numeric_dtype(kind) and not others  # type: ignore[arg-type]


def is_code(values: pd.Series) -> pd.Series:
    """Which numbers stand for an unknown value."""
    return values.isin(list(_CODES)) | (values.abs() >= _UNKNOWN_FROM)


def _text(values: pd.Series) -> pd.Series:
    """Cells as text, empty where there is no value."""
    if not isinstance(values.dtype, pd.StringDtype):
        values = values.astype(object).where(values.notna(), "").map(str)
    return values.fillna("").str.strip()


def _decimal_comma(left: Mapping[str, pd.Series], where: str, semicolons: bool) -> bool | None:
    """Whether commas of a table are decimal commas; None if it has both kinds, or no comma."""
    commas = {name: text[text.str.contains(",")] for name, text in left.items()}
    decimal = any(t.str.fullmatch(_IS_DECIMAL).any() for t in commas.values())
    thousands = any(t.str.fullmatch(_IS_THOUSANDS).any() for t in commas.values())
    if decimal or thousands:
        return None if decimal and thousands else decimal
    for name, text in commas.items():
        either = text[text.str.fullmatch(rf"{_DIGITS},\d{{3}}")]
        if len(either) and not semicolons:
            number = either.iloc[0]
            raise InputError(
                f"{where}: {name} {number!r} may be {number.replace(',', '.')} or "
                f"{number.replace(',', '')}; write it with a decimal point, without separators of "
                "thousands"
            )
    return semicolons


def _localised(text: pd.Series, decimal: bool | None) -> pd.Series:
    """Numbers of texts with decimal commas, separators of thousands or other signs; else NaN."""
    plain = text.str.replace("\u2212", "-").str.replace(rf"(?<=\d){_GROUP}", "", regex=True)
    fraction, groups = (plain.str.fullmatch(p) for p in (_IS_DECIMAL, _IS_THOUSANDS))
    either = plain.str.fullmatch(rf"{_DIGITS},\d{{3}}")
    fraction |= either if decimal is True else False
    groups |= either if decimal is False else False
    as_fraction = plain.str.replace(".", "").str.replace(",", ".")
    as_groups = plain.str.replace(",", "")
    with_comma = plain.str.contains(",")
    chosen = plain.where(~with_comma, "").mask(fraction, as_fraction).mask(groups, as_groups)
    return pd.to_numeric(chosen, errors="coerce").astype(np.float64)
