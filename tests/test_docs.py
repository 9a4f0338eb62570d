"""README and docs: every link leads somewhere, and what they quote is what is there."""

import re

import pytest
from conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(page):
    """Of the headings of a page, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(without_code(page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: nothing is there"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


def test_the_example_of_a_mapping_is_the_one_in_the_examples():
    """docs/own-mapping.md shows examples/own_mapping: the same class, but for the check of its argument."""
    example = (ROOT / "examples" / "own_mapping" / "__init__.py").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-mapping.md").read_text(), flags=re.S)
    for line in shown.splitlines():
        assert line in example.splitlines(), line


def test_the_tree_has_every_file_of_the_package_in_its_folder():
    page = (ROOT / "docs" / "how-it-is-built.md").read_text()
    (tree,) = re.findall(r"```\n(multimax_fairseq/\n.*?)\nscripts/", page, flags=re.S)
    folders, shown = [], set()
    for line in tree.splitlines():
        depth, first = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [first] if first.endswith("/") else []
        shown |= {"".join(folders) + name for name in re.findall(r"[\w.]+\.(?:py|cpp|hpp)\b", line)}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "multimax_fairseq").rglob("*.*")
             if path.suffix in (".py", ".cpp", ".hpp")}  # fmt: skip
    assert {name for name in shown ^ files if not name.endswith(("__init__.py", "__main__.py"))} == set()
