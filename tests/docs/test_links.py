"""The link check sees every kind of link that leads nowhere, and takes nothing else for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import links


def found_in(folder: Path, **documents: str) -> list[str]:
    for name, text in documents.items():
        (folder / name.replace("_", ".")).write_text(text)
    return list(links.problems(folder, sorted(path for path in folder.iterdir() if path.suffix in (".md", ".html"))))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](gone.md)", "a.md:1: gone.md: there is no such file"),
        ("words\n\n![a](gone.png)", "a.md:3: gone.png: there is no such file"),
        ("[a](b.md#gone)", "a.md:1: b.md#gone: b.md has no such anchor"),
        ("# Here\n[a](#there)", "a.md:2: #there: a.md has no such anchor"),
        ("[a](../outside.md)", "leads out of"),
        ('<img src="gone.png">', "gone.png: there is no such file"),
        ("[a]\n\n[a]: gone.md", "a.md:3: gone.md: there is no such file"),
        ("```\n[x](y)\n```\n[a](gone.md)", "a.md:4: gone.md"),
        ("[![a](gone.png)](b.md)", "gone.png: there is no such file"),
    ],
)
def test_a_link_in_markdown_that_leads_nowhere_is_seen(tmp_path: Path, text: str, problem: str) -> None:
    (found,) = found_in(tmp_path, a_md=text, b_md="# Other\n")
    assert problem in found


@pytest.mark.parametrize(
    "text",
    [
        "[a](b.md) [b](b.md#two-words) [c](https://example.org/gone.md#x) [d](mailto:a@example.org)",
        "[a](b.md#two-words-1) [a](b.md#code-in_it-and-marks)",
        "# Here, there\n[a](#here-there)",
        "```\n[a](gone.md)\n```\n`[a](gone.md)` <!-- [a](gone.md) -->",
        "[a](folder) [b](file%20with%20spaces.txt)",
    ],
)
def test_links_that_lead_somewhere_and_code_are_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file with spaces.txt").touch()
    other = "# Two words\n```\n# No heading\n```\n## Two words ##\n### `code in_it`, and marks!\n"
    assert found_in(tmp_path, a_md=text, b_md=other) == []


def test_built_pages_are_checked_as_a_browser_follows_them(tmp_path: Path) -> None:
    page = '<a href="b.html#here"></a><a href="#"></a>\n<a href="b.html#there"></a>\n<script src="no.js?v=1"></script>'
    found = found_in(tmp_path, a_html=page, b_html='<h1 id="here"></h1><a href="https://example.org">x</a>')
    assert found == [
        "a.html:2: b.html#there: b.html has no such anchor",
        "a.html:3: no.js?v=1: there is no such file",
    ]


def test_this_checkouts_documents_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert links.main([]) == 0, capsys.readouterr().out
    assert links.main([str(tmp_path)]) == 1
    assert "holds no built documentation" in capsys.readouterr().out
