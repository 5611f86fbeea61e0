"""Files outside of the package agree with the package and with CI."""

import pathlib
import re
import runpy
from urllib.parse import urlsplit

import pytest
import setuptools

import keras_learnbits as klb

ROOT = pathlib.Path(__file__).parent.parent


def text_of(path):
    return (ROOT / path).read_text()


def test_the_citation_has_the_version_of_the_package():
    assert re.findall(r"^version: (.+)$", text_of("CITATION.cff"), re.MULTILINE) == [
        klb.__version__
    ]


def test_hooks_before_a_commit_are_the_linters_that_ci_runs():
    entries = re.findall(r"entry: (ruff \w+)", text_of(".pre-commit-config.yaml"))
    linters = re.findall(r"^(ruff \w+)", text_of(".ci/run"), re.MULTILINE)
    assert entries == linters == ["ruff check", "ruff format"]


def test_ci_runs_the_command_for_all_tests_that_readme_names():
    (command,) = re.findall(r"^pytest .*?(?= --durations)", text_of(".ci/run"), re.MULTILINE)
    assert "thorough or not thorough" in command
    for page in ("README.md", "BUILD.md", "CONTRIBUTING.md"):
        assert command in text_of(page)


@pytest.fixture
def setup_program(monkeypatch):
    """What setup.py defines, and what it passes to setuptools as `given`."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    names = runpy.run_path(str(ROOT / "setup.py"))
    return {**names, "given": given}


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_the_page_on_the_package_index_has_no_link_that_leads_nowhere(setup_program):
    text = setup_program["given"]["long_description"]
    assert "keras_learnbits quantize" in text
    assert "<!--" not in text
    assert links(text)
    assert all(urlsplit(link).scheme == "https" for link in links(text))


def test_with_an_address_links_and_pictures_lead_into_the_tagged_repository(setup_program):
    settings = setup_program["long_description"].__globals__
    settings["repository"] = "https://example.org/owner/name"
    text = setup_program["long_description"]()
    at = f"https://example.org/owner/name/raw/v{klb.__version__}/docs/images/front.png"
    assert at in links(text)
    assert f"https://example.org/owner/name/blob/v{klb.__version__}/docs/guide.md" in links(text)
    assert len(links(text)) == len(links(text_of("README.md")))
    assert setup_program["project_urls"]()["Issues"] == "https://example.org/owner/name/issues"


def test_each_version_of_python_that_is_declared_is_one_that_may_install(setup_program):
    given = setup_program["given"]
    minors = re.findall(r":: 3\.(\d+)", " ".join(given["classifiers"]))
    assert minors == ["11", "12", "13"]
    assert given["python_requires"] == f">=3.{minors[0]}"


def test_the_changelog_has_a_section_for_the_version_of_the_package():
    assert f"\n## {klb.__version__}" in text_of("CHANGELOG.md")
