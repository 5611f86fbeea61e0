"""Result files, and numbers and tables as the pages write them."""

import json
import pathlib
import statistics

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"


def load(path):
    """Contents of a result file, by its path below experiments/results."""
    return json.loads((RESULTS / path).read_text())


def study(name):
    """Contents of experiments/results/studies/NAME.json."""
    return load(f"studies/{name}.json")


def runs_in(folder):
    """Contents of all result files of a folder below experiments/results, sorted by name."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json"))]


def mean(values):
    return statistics.fmean(values)


def mean_and_spread(accuracies):
    """Per cent; with several seeds and their standard deviation in points."""
    spread = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{mean(accuracies):.2%}{spread}"


def points(difference):
    """A difference of accuracies in percentage points, with its sign."""
    return "" if difference is None else f"{100 * difference:+.2f}"


def markdown(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
