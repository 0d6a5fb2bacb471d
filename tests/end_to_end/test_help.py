"""`--help` answers at once, and alike in all scripts."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("data_prep.py", "pretrain.py", "sample.py")
SLOW = ("torch", "numpy", "tokenizers", "pyarrow", "accelerate", "matplotlib", "rich")


def answer(script: str, *arguments: str, columns: int = 80) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """What a script prints, and the slow packages that it imported."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[script, *arguments]!r}\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "finally:\n"
        f"    print('IMPORTED', *sorted(set({SLOW!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    environment = {**os.environ, "COLUMNS": str(columns), "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    return found, set(found.stderr.split("IMPORTED")[1].split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_slow_and_takes_a_second(script: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found, imported = answer(script, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (found.returncode, imported) == (0, set())
    assert found.stdout.startswith(f"usage: {script}")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_a_bare_pretrain_lists_the_configs_at_once() -> None:
    found, imported = answer("pretrain.py")
    assert (found.returncode, imported) == (2, set())
    assert found.stderr.startswith("error: no config is named")
    assert [path.name for path in (ROOT / "configs").glob("*.yaml") if path.name not in found.stderr] == []


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("columns", [60, 100])
def test_help_breaks_no_name(script: str, columns: int) -> None:
    """Every flag and every value of a choice is whole on a line, at any width of the terminal."""

    def words(text: str) -> set[str]:
        return {word for part in text.split() for word in re.findall(r"[\w./\[\]-]*[\w\]]", part)}

    narrow, wide = (answer(script, "--help", columns=width)[0].stdout for width in (columns, 1000))
    assert words(wide) - words(narrow) == set()
