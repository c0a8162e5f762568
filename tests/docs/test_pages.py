"""README and docs/: nobody reads it twice, its links lead somewhere, and its commands can be typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.config import resume_rules, schema
from finetune.config.load import to_dict
from tests.helpers.doc_pages import DOCS, PAGES, ROOT, SHELL, blocks, commands, parse
from tests.helpers.fresh_checkout import fresh_checkout

LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
OURS = ("finetune", "sky", "make")


def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them from headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = set(re.findall(r'<a name="([^"]+)">', text))
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def test_the_readme_fits_on_two_screens() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert sum(line.startswith("|") for line in text.splitlines()) <= 20, "a README is no reference"
    assert "make demo" in text and "make test" in text
    assert text.count("(docs/guide.md)") == 1
    assert "training set-up guide that this project began with" in " ".join(text.split()), "which guide?"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    """The site's build checks its own pages, too; this one is also for README.md, and for links as GitHub follows them."""
    wrong = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = Path(os.path.normpath(page.parent / name)) if name else page
        made = path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else ""
        if made in ("reference/config.md", "reference/cli.md", "tutorials/notebook.md"):
            continue
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_can_be_typed(page: Path) -> None:
    """Every command of ours in a shell block is parsed by its program: an option that is gone is found here."""
    for block in blocks(page):
        if block.language not in SHELL:
            continue
        marked = block.language != ""
        for words in commands(block.text) if marked else plain_commands(block.text):
            try:
                parse(words)
            except (SystemExit, Exception) as error:
                pytest.fail(f"{page.name}, block at line {block.line}: {' '.join(words)}: {error!r}")


def plain_commands(text: str) -> list[list[str]]:
    """Blocks without a language also show output: only lines that begin with a command of ours count."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.split(" ")[0] in OURS]
    return [words for line in lines for words in commands(line) if words[0] in OURS]


def test_pages_that_test_commands_have_some() -> None:
    found = [words for page in PAGES for block in blocks(page) for words in plain_commands(block.text)]
    assert len(found) > 60 and {words[0] for words in found} == set(OURS)


def test_the_guide_is_compared_key_by_key() -> None:
    """The keys of docs/guide.md exist, and so do their values in the config that keeps the guide's."""
    values = to_dict(schema.RunConfig())
    keys = set(resume_rules.RULES) | set(resume_rules.BATCH_KEYS) | set(resume_rules.ORDER_KEYS)
    rows = [line for line in (DOCS / "guide.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) >= 20
    for row in rows:
        section = ""
        for key in re.findall(r"`([\w.]+)`", row.split("|")[1]):
            section = key.split(".")[0] if "." in key else section
            full = key if "." in key else f"{section}.{key}"
            assert full in keys and full.split(".")[1] in values[section], full


def test_every_error_message_names_a_page_that_exists() -> None:
    found = set()
    for path in [
        *(ROOT / "finetune").rglob("*.py"),
        *(ROOT / "sky").glob("*.yaml"),
        *(ROOT / "on_machine").rglob("*.*"),
    ]:
        if path.suffix in (".py", ".yaml", ".sh"):
            text = path.read_text(encoding="utf-8")
            found |= set(re.findall(r"(?<![\w./(-])docs/[\w/-]+\.md", text))
    assert len(found) >= 4
    assert all((ROOT / name).is_file() for name in found), found


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """As `make docs` does; nothing of it is loaded from elsewhere."""
    built = build(ROOT, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8"))
        assert not loaded, (page.name, loaded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "[x](cloud.md#no-such-heading)",
        "[x](no-such-page.md)",
        "[x](../finetune/no_such_file.py)",
        "[x](../../elsewhere.md)",
    ],
)
def test_a_broken_link_fails_the_build(tmp_path: Path, fault: str) -> None:
    fresh_checkout(tmp_path / "project")
    page = tmp_path / "project" / "docs" / "log.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n{fault}\n", encoding="utf-8")
    built = build(tmp_path / "project", tmp_path / "site")
    assert built.returncode == 1 and "Aborted with 1 warnings" in built.stdout + built.stderr


@pytest.mark.slow
def test_a_page_outside_the_menu_fails_the_build(tmp_path: Path) -> None:
    fresh_checkout(tmp_path / "project")
    (tmp_path / "project" / "docs" / "forgotten.md").write_text("# Forgotten\n", encoding="utf-8")
    built = build(tmp_path / "project", tmp_path / "site")
    assert built.returncode == 1 and "forgotten.md" in built.stderr


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=project, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
