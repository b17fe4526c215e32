"""The scripts under benchmarks/ can be imported: what they use of the package is there."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_finds_all_that_it_imports(script: Path) -> None:
    assert runpy.run_path(str(script), run_name="imported")["__doc__"]
