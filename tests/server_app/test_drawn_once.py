"""Drawings that are kept: the same figures are drawn once, others again, and few are held."""

from __future__ import annotations

from server_app.reporting.drawing import KEPT, drawn_once
from server_app.vectors.report_events import Story


def test_the_same_figures_are_drawn_once_and_any_other_again() -> None:
    drawn: list[tuple[str, Story]] = []

    @drawn_once
    def draw(name: str, story: Story) -> int:
        drawn.append((name, story))
        return len(drawn)

    assert draw("a", Story()) == draw("a", Story()) == 1
    assert draw("a", Story(spans=1.0)) == 2
    assert draw("\ud800", Story(spans=1.0 + 2**-52)) == 3
    assert len(drawn) == 3


def test_no_more_than_a_few_drawings_are_kept() -> None:
    drawn: list[int] = []

    @drawn_once
    def draw(number: int) -> int:
        drawn.append(number)
        return number

    for number in [*range(KEPT + 1), KEPT, 0]:
        assert draw(number) == number
    assert drawn == [*range(KEPT + 1), 0]
