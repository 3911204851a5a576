"""Figures written for people. A privacy loss rounds up; the rest rounds to the nearest."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal

MISSING = "–"


def percent(value: float | None, digits: int = 1) -> str:
    """``0.8642`` → ``86.4%``."""
    return MISSING if value is None else f"{100 * value:.{digits}f}%"


def points(value: float | None) -> str:
    """A difference of two shares: ``-0.012`` → ``−1.2 points``; never a rounded-away sign."""
    if value is None:
        return MISSING
    plain = f"{100 * value:+.1f}".replace("-", "−")
    return f"{'±' + plain[1:] if plain[1:] == '0.0' else plain} points"


def fixed(value: float | None, digits: int = 3) -> str:
    """Write a score or a loss with a fixed number of digits, or plainly if it is huge."""
    if value is None:
        return MISSING
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def whole(value: float | None) -> str:
    """``12345`` → ``12,345``."""
    return MISSING if value is None else f"{value:,.0f}"


def epsilon(value: float | None) -> str:
    """Two digits, rounded up: a privacy loss is never shown smaller than it is."""
    if value is None:
        return MISSING
    if value == float("inf"):
        return "∞"
    if value >= 1e6:
        return "more than a million"
    return f"{Decimal(repr(value)).quantize(Decimal('0.01'), ROUND_CEILING):f}"


def delta(value: float | None) -> str:
    """``1e-05`` → ``1 · 10⁻⁵``, rounded up."""
    if value is None or not 0 < value < 1:
        return MISSING if value is None else f"{value:g}"
    exact = Decimal(repr(value))
    power = exact.adjusted()
    mantissa = exact.scaleb(-power).quantize(Decimal("0.01"), ROUND_CEILING).normalize()
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa:f} · 10{raised}"


def duration(value: float | None) -> str:
    """``4210`` → ``1 h 10 min``."""
    if value is None:
        return MISSING
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def interval(share: float | None, total: int | None) -> tuple[float, float] | None:
    """Return the 95% interval of a proportion."""
    if share is None or not total or not 0 <= share <= 1:
        return None
    z2 = 1.959964**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = math.sqrt(share * (1 - share) / total * z2 + (z2 / (2 * total)) ** 2)
    return centre - spread / (1 + z2 / total), centre + spread / (1 + z2 / total)
