"""The documents: their text, and their blocks of code by the words above them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(page for page in ROOT.glob("[!.]*/**/*.md") if "runs" not in page.parts) + sorted(ROOT.glob("*.md"))


def block(name: str, page: str = "README.md", language: str = "python") -> str:
    """The first block below the words `name`, which are bold, a heading, or begin a line."""
    text = (ROOT / page).read_text()
    below = re.search(
        rf"^(?:#+ |.*\*\*)?{re.escape(name)}.*?^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE
    )
    assert below, f"{page} has no {language} below {name!r}"
    return below[1]


def blocks(page: Path, language: str = "python") -> list[str]:
    """All of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
