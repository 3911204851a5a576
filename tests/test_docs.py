"""What README and docs/ say of this repository is there: tests, files, the policy's entries."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from client_app import policy
from client_app.policy import HospitalPolicy

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PRIVACY = ROOT / "docs" / "privacy.md"
SECURE = ROOT / "docs" / "secure-aggregation.md"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_TEST = re.compile(r"([\w./-]+\.py)::(\w+)")
_LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def mentions() -> list[tuple[str, str, str]]:
    """(page, path, test) of every test that a page names."""
    found = {(name(p), *pair) for p in PAGES for pair in _TEST.findall(p.read_text())}
    return sorted(found)


def links() -> list[tuple[str, str]]:
    """(page, target) of every link to a file or heading of this repository."""
    found = {
        (name(page), target)
        for page in PAGES
        for target in _LINK.findall(_FENCE.sub("", page.read_text()))
        if not re.match(r"[a-z][a-z0-9+.-]*:", target)
    }
    return sorted(found)


def policies() -> list[tuple[str, str]]:
    """(page, text) of every example of a policy file."""
    return [
        (name(page), text)
        for page in PAGES
        for language, text in _FENCE.findall(page.read_text())
        if language == "toml" and ("[aggregation]" in text or "[privacy]" in text)
    ]


@cache
def functions(path: str) -> frozenset[str]:
    """The functions of a module of tests, methods too."""
    tree = ast.parse((ROOT / path).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in headings}


@pytest.mark.parametrize(("page", "path", "test"), mentions())
def test_every_test_that_a_page_names_exists(page: str, path: str, test: str) -> None:
    assert (ROOT / path).is_file(), f"{page} names {path}, which does not exist"
    assert test.startswith("test_")
    assert test in functions(path), f"{page} names {test}, which is not in {path}"


@pytest.mark.parametrize(("page", "target"), links())
def test_every_relative_link_leads_somewhere(page: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists(), f"{page} links to {target}, which does not exist"
    assert file.resolve().is_relative_to(ROOT)
    if anchor and file.suffix == ".md":
        assert anchor in anchors(file), f"{page} links to {target}: no such heading"


@pytest.mark.parametrize(("page", "text"), policies())
def test_every_policy_example_is_read_by_the_hospital(page: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(text)
    HospitalPolicy.load(file)


@pytest.mark.parametrize(
    ("page", "table", "model"),
    [(SECURE, "aggregation", policy.Aggregation), (PRIVACY, "privacy", policy.Privacy)],
)
def test_a_page_shows_every_entry_of_its_part_of_the_policy_at_its_default(
    page: Path, table: str, model: type[BaseModel], tmp_path: Path
) -> None:
    (text,) = (text for found, text in policies() if found == name(page))
    entries = {field.alias for field in model.model_fields.values()}
    assert set(tomllib.loads(text)[table]) == entries
    file = tmp_path / "policy.toml"
    file.write_text(text)
    silent = tmp_path / "silent.toml"
    silent.write_text("version = 1\n")
    assert HospitalPolicy.load(file) == HospitalPolicy.load(silent)


def test_the_page_on_aggregation_names_a_test_for_every_rule() -> None:
    _, _, rest = SECURE.read_text().partition("## Rules that no configuration turns off")
    rows = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    rules = rows[1:]  # after the head
    assert len(rules) >= 15
    assert [row for row in rules if not _TEST.search(row)] == []


def test_no_page_names_a_path_of_this_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.~])/(work|home|root|tmp)/", page.read_text()), name(page)
