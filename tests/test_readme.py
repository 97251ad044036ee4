"""What the README and the examples show runs as it stands there."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_has_examples():
    assert len(BLOCKS) >= 3


def test_readme_examples():
    names = {"__name__": "readme"}  # one after the other, as a reader would type them
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_example(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert "step 100" in capsys.readouterr().out
