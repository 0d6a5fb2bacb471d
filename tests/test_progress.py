"""A preparation says how far it is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipeline.data.preparing import progress as progressing
from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.progress import UnitProgress
from pipeline.data.preparing.request import Request
from pipeline.data.reading.formats import TextRules

LINE = (
    r"preparing: \d+%, [\d.]+ [kMG]?B of [\d.]+ [kMG]?B of text, [\d,]+ tokens/s, \d+:\d\d so far(, \d+:\d\d left)?, "
)


def report(**values: Any) -> Any:
    return SimpleNamespace(**values)


def test_without_a_terminal_a_line_comes_in_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progressing, "INTERVAL", 0.05)
    stream = io.StringIO()
    with UnitProgress(Console(file=stream, soft_wrap=True), total=4_000_000) as progress:
        time.sleep(0.2)
        progress.on_batch(1_000_000, 250_000)
        progress.on_unit(report(tokens=500_000, dropped=3), size=2_000_000)
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert 2 <= len(lines) <= 8
    assert lines[0].startswith("preparing: 0%, 0 bytes of 4.0 MB of text, 0 tokens/s, 0:00 so far, 0 dropped")
    assert re.fullmatch(LINE + "3 dropped", lines[-1])
    assert lines[-1].startswith("preparing: 50%, 2.0 MB of 4.0 MB of text")
    time.sleep(0.15)
    assert stream.getvalue().splitlines() == lines, "nothing comes after the end"


def test_on_a_terminal_there_is_a_bar_and_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progressing, "INTERVAL", 0.02)
    stream = io.StringIO()
    with UnitProgress(Console(file=stream, force_terminal=True, width=120), total=100) as progress:
        progress.on_batch(50, 10)
        time.sleep(0.1)
    assert "━" in stream.getvalue()
    assert "of text" not in stream.getvalue()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_preparation_into_a_log_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(progressing, "INTERVAL", 0.02)
    corpus = tmp_path / "a.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{number} " * 200}) + "\n" for number in range(6000)))
    stream = io.StringIO()
    wanted = Request(
        inputs=(str(corpus),),
        output=tmp_path / "out",
        tokenizer="bytes",
        workers=workers,
        backend="tokenizers",
        rules=TextRules(unit_bytes=10**6),
    )
    prepare(wanted, console=Console(file=stream, soft_wrap=True))
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("preparing: ")]
    assert len(lines) >= 3
    assert all(re.fullmatch(LINE.replace("[kMG]?B", r"(bytes|[kMG]?B)") + "0 dropped", line) for line in lines)
    shares = [int(re.findall(r"(\d+)%", line)[0]) for line in lines]
    assert shares == sorted(shares)
    assert shares[-1] > 0
