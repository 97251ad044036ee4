"""What the README and the pages of docs/ show runs as it stands there.

The Python blocks of a page run one after the other in one namespace, as a reader would type them. A
block that needs an optional package stands behind a line ``<!-- needs: torchjd -->``; it is left out where
that is not installed, and the page's test says so. Code that is not to run stands in a ``text`` block.
"""

import contextlib
import importlib.util
import io
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?:<!-- needs: ([\w, ]+) -->\n+)?```python\n(.*?)```", re.DOTALL)
PAGES = [
    "README.md",
    "docs/quick_start.md",
    "docs/fs_mtl.md",
    "docs/recipes.md",
    "docs/migrate_sam.md",
    "docs/migrate_torchjd.md",
    "docs/migrate_libmtl.md",
]
# pages written elsewhere that have examples
PAGES += sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "docs").glob("*.md")
    if str(path.relative_to(ROOT)) not in PAGES and "```python" in path.read_text()
)


def blocks(page: str) -> list[tuple[list[str], str]]:
    """The packages each block needs, and its code, on the lines where it stands in the page."""
    text = (ROOT / page).read_text()
    found = []
    for match in BLOCK.finditer(text):
        packages = re.split(r"[ ,]+", match[1].strip()) if match[1] else []
        found.append((packages, "\n" * text[: match.start(2)].count("\n") + match[2]))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_example_is_seen(page):
    """None is lost to the pattern."""
    text = (ROOT / page).read_text()
    assert len(blocks(page)) == len(re.findall(r"^```python$", text, re.MULTILINE)) >= 1
    assert text.count("<!-- needs:") == sum(bool(packages) for packages, _ in blocks(page))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*")
@pytest.mark.parametrize("page", PAGES)
def test_examples_of(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what they save
    names, left_out = {"__name__": "page"}, set()
    for packages, code in blocks(page):
        missing = {name for name in packages if importlib.util.find_spec(name) is None}
        left_out |= missing
        if not missing:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                if packages:
                    warnings.simplefilter("ignore")  # their own
                exec(compile(code, str(ROOT / page), "exec"), names)
    if left_out:
        pytest.skip(f"but for the examples that need {', '.join(sorted(left_out))}, {page} has run")
