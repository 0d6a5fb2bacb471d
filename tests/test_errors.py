"""How messages name amounts and take a guess at what was meant."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError, counted, nearest, sized, verdict


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (12_340_000, "12.3 MB"),
        (9.96e8, "996.0 MB"),
        (1_000_000_000, "1.0 GB"),
        (80e9, "80.0 GB"),
        (5 * 10**12, "5.0 TB"),
        (3 * 10**15, "3,000.0 TB"),
    ],
)
def test_sizes_are_said_in_a_unit_that_fits(count: float, said: str) -> None:
    assert sized(count) == said


def test_one_is_not_counted_in_plurals() -> None:
    assert [counted(n, "file") for n in (0, 1, 2, 3000)] == ["0 files", "1 file", "2 files", "3,000 files"]


def test_the_nearest_name_is_offered_where_one_is_near() -> None:
    assert "'steps'" in nearest("stesp", ["steps", "seed"])
    assert "'" not in nearest("entirely different", ["steps", "seed"])


def test_messages_show_what_they_quote_without_its_control_characters() -> None:
    code, message = verdict(UserError("no \x1b[2Jfile \udcff\0 é\n  " + "x" * 10**6))
    assert code == 2
    first, second = message.split("\n")
    assert first == r"error: no \x1b[2Jfile \udcff\x00 é"
    assert len(second) < 3000
