"""Files outside of the package agree with the package and with CI."""

import pathlib
import re

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
