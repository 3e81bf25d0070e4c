"""Numbers that remember how they came about, so that a figure and its printed formula cannot disagree.

    amount(100, "passages") * amount(2, "bytes")     value 200, text "100 passages x 2 bytes"

Contract: arithmetic on amounts is arithmetic on floats; the text has every number put in, with brackets where they are
needed. `named` puts a result into a later formula as one number, so that formulas stay short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_SUM, _PRODUCT, _ATOM = range(3)
# From here on digits are only counted, not read.
_MAX_WRITTEN = 1e12


@dataclass(frozen=True, slots=True)
class Value:
    """A result and its formula; made by arithmetic on amounts."""

    value: float
    text: str
    _binding: int = _ATOM

    def __add__(self, other: Value) -> Value:
        return Value(self.value + other.value, f"{self.text} + {other.text}", _SUM)

    def __mul__(self, other: Value) -> Value:
        return Value(self.value * other.value, f"{self._bound(_PRODUCT)} x {other._bound(_PRODUCT)}", _PRODUCT)

    def __truediv__(self, other: Value) -> Value:
        return Value(self.value / other.value, f"{self._bound(_PRODUCT)} / {other._bound(_ATOM)}", _PRODUCT)

    def rounded_up(self) -> Value:
        """The next whole number."""
        # A quotient that is whole but for rounding is whole.
        return Value(float(math.ceil(self.value * (1 - 1e-12))), f"ceil({self.text})")

    def named(self, what: str) -> Value:
        """The result as one number of a later formula."""
        return Value(self.value, f"{number(self.value)} {what}".rstrip())

    def _bound(self, binding: int) -> str:
        return self.text if self._binding >= binding else f"({self.text})"


def amount(value: float, what: str = "") -> Value:
    """A number that is given, with what it counts."""
    return Value(float(value), f"{number(value)} {what}".rstrip())


def number(value: float) -> str:
    """A number as formulas show it: whole ones in full, others to four digits."""
    if float(value).is_integer() and abs(value) < _MAX_WRITTEN:
        return f"{value:,.0f}"
    return f"{value:.4g}"
