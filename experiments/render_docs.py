"""Renders the tables and figures of README and docs from their result files.

python experiments/render_docs.py
python experiments/render_docs.py --check

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, a figure within a sentence
between `<!-- = NAME -->` and `<!-- / -->`. The rest of a page is free. No line may begin with the
mark of a figure, because Markdown takes such a line for HTML.
"""

import functools
import re

from absl import app, flags
from rendering import (
    agreement,
    exports,
    gallery,
    hardware,
    post_training,
    sequences,
    speed,
    training,
)
from rendering.figures import FIGURES
from rendering.formats import ROOT

FLAGS = flags.FLAGS
flags.DEFINE_bool("check", False, "Fail if a page differs from its files; write nothing.")

BLOCK = re.compile(r"(<!-- begin (.+?) -->\n)(.*?)(<!-- end \2 -->)", re.S)
FIGURE = re.compile(r"(<!-- = (.+?) -->)(.*?)(<!-- / -->)", re.S)
HTML = re.compile(r"^\s*<!-- [=/].*", re.M)


def _tables(function, *names):
    """A table for each argument of a function, by the function's name and the argument."""
    return {
        f"{function.__name__} {' '.join(arguments)}": functools.partial(function, *arguments)
        for arguments in names
    }


TABLES = {
    "post-training in short": post_training.post_training_in_short,
    "post-training": post_training.post_training,
    "images": post_training.images,
    "drop": post_training.drop,
    "parts": post_training.parts,
    "decisions": exports.decisions,
    **_tables(exports.sizes, ("mnist",), ("cifar10",)),
    "latencies": exports.latencies,
    "gallery": gallery.gallery,
    "gallery conversion": gallery.conversion,
    "gallery latency": gallery.latency,
    "hardware": hardware.hardware,
    **_tables(
        training.pareto,
        ("cifar10",),
        ("cifar10-long",),
        ("cifar10-resnet20",),
        ("cifar10-resnet20-100",),
        ("cifar10-resnet20-100-a4",),
        ("cifar10-quarter",),
    ),
    "programs": training.programs,
    "hgq2 trials": training.hgq2_trials,
    "start": training.start,
    "published": training.published,
    **_tables(
        agreement.agreement,
        *((problem, loss) for problem in ("mnist", "cifar10") for loss in ("fit", "evaluate")),
    ),
    "normalization": agreement.normalization,
    **_tables(speed.overhead, ("float32",), ("mixed_bfloat16",)),
    **_tables(speed.first_step, ("first-step",), ("first-step-metrics",)),
    "growth": speed.growth,
    "dense ratios": speed.dense_ratios,
    "pipelines": speed.pipelines,
    "sequences": sequences.sequences,
}


def rendered(text):
    """A page with its tables and figures as the result files have them.

    Raises:
        ValueError: A table or a figure is not known, or a line begins with the mark of a figure.
    """
    if HTML.search(text):
        raise ValueError(
            "No line may begin with the mark of a figure; wrap the paragraph in another way. "
            f"Received: {HTML.search(text)[0]!r}"
        )

    def table(match):
        return f"{match[1]}\n{_known(TABLES, match[2])()}\n\n{match[4]}"

    def figure(match):
        value = _known(FIGURES, match[2])()
        # A figure may be wrapped at the end of a line.
        same = match[3].split() == value.split()
        return match[0] if same else f"{match[1]}{value}{match[4]}"

    return FIGURE.sub(figure, BLOCK.sub(table, text))


def _known(table, name):
    if name not in table:
        raise ValueError(f"A page names one of {', '.join(table)}. Received: {name!r}")
    return table[name]


def main(argv):
    del argv
    different = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text()
        new = rendered(text)
        if new != text:
            different.append(str(page.relative_to(ROOT)))
            if not FLAGS.check:
                page.write_text(new)
    if FLAGS.check and different:
        raise SystemExit(
            f"{', '.join(different)} differ from their result files: run "
            "`python experiments/render_docs.py`."
        )
    print(f"{len(different)} pages changed.")


if __name__ == "__main__":
    app.run(main)
