"""`report.html` has the right numbers, and needs no other files."""

import html.parser
import json
import re

import pytest

from keras_learnbits.command_line.page import report_page

VOID = {"meta", "line"}


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; refuses tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.cells = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


@pytest.fixture
def summary(written):
    return json.loads((written / "report.json").read_text())


def test_the_page_says_what_the_json_says(written, summary):
    page = Page((written / "report.html").read_text())
    text = " ".join(page.words)
    assert f"{summary['float_bytes'] / summary['packed_bytes']:.1f} times smaller" in text
    assert summary["command"] in text
    for name, size in summary["files"].items():
        assert page.cells[page.cells.index(name) + 1] == f"{size:,}"
    for layer, bits in summary["bits"].items():
        assert page.cells[page.cells.index(layer) + 1] == str(bits)


def test_the_page_needs_nothing_else(written):
    page = Page((written / "report.html").read_text())
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert "url(" not in "".join(page.words)


def test_blocks_are_as_wide_as_shares_of_the_weights_and_as_high_as_bits(written, summary):
    page = (written / "report.html").read_text()
    blocks = [
        dict(re.findall(r'(\w+)="([\d.]+)"', block)) for block in re.findall("<rect .*?>", page)
    ]
    weights, bits = list(summary["weights"].values()), list(summary["bits"].values())
    assert len(blocks) == len(bits) == 2
    for block, size, width in zip(blocks, weights, bits, strict=True):
        assert float(block["width"]) == pytest.approx(100 * size / sum(weights), abs=1e-2)
        assert float(block["height"]) == pytest.approx(100 * width / max(4, *bits), abs=1e-2)


def test_the_worth_of_a_bit_is_the_difference_of_neighbouring_widths(summary):
    summary |= {"bits": {"hidden": 2, "head": 1}}
    summary["worth"] = {"hidden": [0.5, 0.2, 0.05] + [None] * 13, "head": [0.04] + [None] * 15}
    cells = Page(report_page(summary)).cells
    start = cells.index("with one bit more") + 1
    assert cells[start : start + 5] == ["hidden", "2", "20.0%", "+30.0%", "\u221215.0%"]
    assert cells[start + 5 : start + 10] == ["head", "1", "4.0%", "\u2013", "\u2013"]


def test_names_are_escaped(summary):
    name = "<script>alert('x')</script>&amp;"
    for key in ("bits", "weights", "worth", "shapes"):
        summary[key] = {name: summary[key]["head"]}
    summary |= {
        "model": name,
        "source": name,
        "command": name,
        "skipped": {"model.onnx": name},
        "warnings": [name],
    }
    page = Page(report_page(summary))
    assert "script" not in page.tags
    assert "".join(page.words).count(name) >= 7
