"""Shows mkdocs each file under its path in the repository, so that links lead to the same there.

`README.md` is the home page, and what pages link to outside of `docs/` comes along: a file as it
is, a folder as a list of its files. So mkdocs knows all that links may lead to, and its strict
mode refuses the others. Notebooks are pages, which mkdocs-jupyter renders.
"""

import logging
import os
import pathlib
import re

import bs4
from mkdocs.structure.files import File, Files, InclusionLevel

LINK = re.compile(r"\]\(([^)\s#]+)")
LOGGER = logging.getLogger("mkdocs.hooks")  # strict mode counts its warnings


class Notebook(File):
    """A page whose content mkdocs-jupyter makes."""

    def is_documentation_page(self):
        return True


class Folder(File):
    """A page that lists the files below a folder."""

    def is_documentation_page(self):
        return True

    def fill(self, names):
        self.dest_uri = f"{self.src_uri}/index.html"
        rows = [f"- [{name}]({pathlib.Path(self.src_uri).name}/{name})" for name in names]
        self.content_string = "\n".join([f"# {self.src_uri}", "", *rows])


def on_files(files, config):
    """The theme's files as they are, and the repository's under their paths there."""
    root = pathlib.Path(config.config_file_path).parent

    def make(path, cls=None, inclusion=InclusionLevel.NOT_IN_NAV):
        cls = cls or (Notebook if path.suffix == ".ipynb" else File)
        name = path.relative_to(root).as_posix()
        arguments = name, str(root), config.site_dir, config.use_directory_urls
        return cls(*arguments, inclusion=inclusion)

    theme = [file for file in files if file.src_dir != config.docs_dir]
    docs = [
        make(pathlib.Path(file.abs_src_path), inclusion=file.inclusion)
        for file in files
        if file.src_dir == config.docs_dir
    ]
    pages = docs + [make(path) for path in root.glob("*.md")]
    linked = []
    for path in _linked_from(pages):
        if root in path.parents and path.is_file():
            linked.append(make(path))
        elif root in path.parents and path.is_dir():
            below = sorted(each for each in path.rglob("*.*") if each.suffix != ".pyc")
            folder = make(path, Folder)
            folder.fill([each.relative_to(path).as_posix() for each in below])
            linked += [folder, *map(make, below)]
    # Of those with the same path the last one counts.
    return Files([*theme, *linked, *pages])


def on_page_content(html, page, config, files):
    """Gives a notebook the site's look, and its links the addresses of pages.

    mkdocs-jupyter puts JupyterLab's styles into each page, 0.6 MB, and scripts that load MathJax
    and Mermaid from other servers. `docs/extra.css` has what is needed of the styles, and Material
    for MkDocs colours code and copies it.
    """
    if not isinstance(page.file, Notebook):
        return html
    soup = bs4.BeautifulSoup(html, "html.parser")
    for tag in soup.select("script, style, .jp-InputPrompt, .jp-OutputPrompt"):
        tag.decompose()
    for tag in soup.select(".zeroclipboard-container, .clipboard-copy-txt"):
        tag.decompose()
    for tag in soup.select(".highlight-ipynb"):
        tag["class"] = "highlight"
        code = soup.new_tag("code")
        code.extend(list(tag.pre.contents))
        tag.pre.append(code)
    for tag in soup.select("a.anchor-link"):
        tag["class"] = "headerlink"
    for tag in soup.select("a[href]"):
        path, mark, anchor = tag["href"].partition("#")
        if path and "://" not in path:
            path = os.path.normpath(os.path.join(os.path.dirname(page.file.src_uri), path))
            file = files.get_file_from_path(path)
            if file is None:
                LOGGER.warning("%s has a link to %s, which is missing", page.file.src_uri, path)
            else:
                tag["href"] = file.url_relative_to(page.file) + mark + anchor
    return str(soup)


def _linked_from(pages):
    """Absolute paths that the links of pages would lead to, if they are paths."""
    for page in pages:
        if page.is_documentation_page():
            for target in LINK.findall(page.content_string):
                path = os.path.join(os.path.dirname(page.abs_src_path), target)
                yield pathlib.Path(os.path.normpath(path))
