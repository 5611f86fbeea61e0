import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys
import urllib.parse

import pytest

import keras_learnbits as klb

ROOT = pathlib.Path(__file__).parent.parent
DESCRIBED = [
    name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the site, built in strict mode."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_public_name_is_in_the_reference_once():
    names = [module.name for module in pkgutil.walk_packages(klb.__path__, "keras_learnbits.")]
    described = [pkgutil.resolve_name(name) for name in DESCRIBED]
    for module in [klb, *map(importlib.import_module, names)]:
        for name in getattr(module, "__all__", []):
            public = getattr(module, name)
            assert sum(each is public for each in described) == 1, name


@pytest.mark.thorough
def test_the_program_of_the_hardware_page_ends_with_an_exact_circuit(tmp_path):
    page = (ROOT / "docs" / "hardware.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    difference, accuracy = re.findall(r"(?:difference|accuracy): (\S+)", done.stdout)
    assert float(difference) == 0
    assert float(accuracy) > 0.85


@pytest.mark.thorough
def test_nothing_is_in_the_reference_twice(site):
    pages = [page.read_text() for page in (site / "docs" / "api").rglob("*.html")]
    for name in DESCRIBED:
        assert sum(page.count(f'id="{name}"') for page in pages) == 1, name


@pytest.mark.thorough
def test_all_links_of_the_site_lead_somewhere(site):
    pages = set(site.rglob("*.html")) - {site / "404.html"}  # it is shown under any path
    assert len(pages) > 10
    for page in pages:
        for link in re.findall(r'(?:href|src)="([^"]*)"', page.read_text()):
            target = urllib.parse.urlsplit(link)
            if not target.scheme and not target.netloc:
                assert (page.parent / urllib.parse.unquote(target.path)).exists(), (page, link)


@pytest.mark.thorough
def test_the_examples_of_the_reference_are_set_as_code(site):
    for page in (site / "docs" / "api").rglob("*.html"):
        text = page.read_text()
        assert "&gt;&gt;&gt;" in text
        assert "<blockquote>" not in text, page


@pytest.mark.thorough
def test_pages_of_notebooks_have_pictures_and_load_nothing_from_other_servers(site):
    pages = sorted((site / "docs" / "notebooks").rglob("*.html"))
    assert len(pages) == len(list((ROOT / "docs" / "notebooks").glob("*.ipynb"))) > 0
    for page in pages:
        text = page.read_text()
        assert '<img alt="' in text
        assert not re.findall(r'(?:src=|from )"(?:https?:)?//[^"]*"', text), page
