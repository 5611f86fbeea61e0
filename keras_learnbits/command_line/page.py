"""`report.html`: the report of a quantization, one page without scripts or external resources."""

import html

from keras_learnbits.command_line.charts import bar, width_chart
from keras_learnbits.command_line.files import PACKED, PURPOSES
from keras_learnbits.command_line.style import STYLE

MINUS = "\N{MINUS SIGN}"
TINY = "&lt;0.001%"
DASH = "\N{EN DASH}"


def report_page(summary):
    """The page of a report.

    Args:
        summary: Dictionary, the content of `report.json`.

    Returns:
        String, a whole HTML document.
    """
    parts = [
        _header(summary),
        _section("Agreement with the float model", _agreement(summary)),
        _section("Bit-width of each layer", _widths(summary)),
        _section("Effect of one bit more or fewer", _worth(summary)),
        _section("Files", _files(summary)),
        _section("How it was made", _making(summary)),
    ]
    title = _text(f"{summary['model']}, quantized")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(summary):
    before, after = summary["float_bytes"], summary["packed_bytes"]
    figures = [
        ("in float32", _bytes(before)),
        ("packed", _bytes(after)),
        ("times smaller", f"{before / after:.1f}"),
        ("mean bits per weight", f"{summary['mean_bits']:.2f}"),
    ]
    return (
        f"<header><h1>{_text(summary['model'])}: {before / after:.1f} times smaller</h1>\n"
        f"<p>Quantized from {_text(summary['source'])} on {_text(summary['date'])}</p>\n"
        f"{_figures(figures)}</header>"
    )


# What a movement of 100% is, in each of its units.
MEANING_OF_ALL = {
    "standard deviation": "100% a model that always gives the mean output. ",
    "size": "100% a model that always gives zeros. The outputs of the float model are constant. ",
}


def _agreement(summary):
    count = _held_out(summary["examples"])
    figures = [("outputs moved by", _percent(summary["movement"]))]
    explained = (
        f"On {count} of the examples, which no weight was trained on, the outputs differ from "
        f"those of the float model by {_percent(summary['movement'])} of their "
        f"{summary['movement_unit']} (root mean square); 0% would be the float model itself, "
        + MEANING_OF_ALL[summary["movement_unit"]]
    )
    if summary["agreement"] is not None:
        figures.append(("same class", _percent(summary["agreement"])))
        explained += (
            f"For {_percent(summary['agreement'])} of them the largest output, the predicted "
            "class, is the same. "
        )
    explained += (
        f"Before weights were trained the outputs had moved by "
        f"{_percent(summary['movement_rounded'])}."
        if summary["steps"]
        else "No weight was trained."
    )
    accuracy = summary["accuracy"]
    if accuracy is not None:
        figures.append(("accuracy", f"{accuracy['quantized']:.2%}"))
        figures.append(("accuracy of the float model", f"{accuracy['float']:.2%}"))
        explained += " Accuracy is the share of labelled examples that are classified correctly."
        if "max_accuracy_drop" in summary["target"]:
            explained += (
                " The size was chosen on these examples, so on new ones it may be a little lower."
            )
    warnings = "".join(f"<p><strong>Warning:</strong> {_text(w)}</p>" for w in summary["warnings"])
    return f"{warnings}{_figures(figures)}<p>{_text(explained)}</p>"


def _held_out(examples):
    """Number of examples on which `quantize` measures the change of the outputs."""
    return min(max(examples // 8, 1), 256)


def _widths(summary):
    bits, weights = summary["bits"], summary["weights"]
    total, highest = sum(weights.values()), max(8, *bits.values())
    rows = [
        (
            ("name", _text(layer)),
            ("", bar(bits[layer], highest)),
            ("number", _percent(weights[layer] / total)),
            ("number", f"{weights[layer]:,}"),
            ("number", "&times;".join(map(str, summary["shapes"][layer]))),
        )
        for layer in bits
    ]
    head = ("layer", "bits per weight", "!share of weights", "!weights", "!shape")
    inputs = summary["activation_bits"]
    others = (
        f"{summary['float_parameters']:,} further parameters, such as biases and normalization, "
        "stay in float32 and are counted in the packed size."
    )
    if inputs:
        widths = " or ".join(map(str, sorted(set(inputs.values()))))
        others += f" {len(inputs)} layer inputs are quantized to {widths} bits."
    return (
        "<p>Each block is a layer: as wide as its share of the weights and as high as its "
        "bit-width, so its area is the memory that it takes. The dashed line is the mean.</p>\n"
        f"{width_chart(bits, weights, summary['mean_bits'])}\n{_table(head, rows)}\n"
        f'<p class="note">{others}</p>'
    )


def _worth(summary):
    rows = []
    for layer, losses in summary["worth"].items():
        width = summary["bits"][layer]
        rows.append(
            (
                ("name", _text(layer)),
                ("number", str(width)),
                ("number", _percent(losses[width - 1])),
                ("number", _change("+", _loss_at(losses, width - 1), losses[width - 1])),
                ("number", _change(MINUS, losses[width - 1], _loss_at(losses, width + 1))),
            )
        )
    head = ("layer", "!bits", "!squared change", "!with one bit fewer", "!with one bit more")
    return (
        "<p>The squared change of the outputs that each layer causes at its bit-width, relative to "
        "the outputs' variance (100%: a model that always returns the mean output), and how much "
        "it would rise with one bit fewer in this layer, or fall with one bit more.</p>\n"
        f"{_table(head, rows)}\n"
        '<p class="note">Measured before weights are trained, with all other layers at 16 bits; '
        "above 5 bits each further bit is assumed to divide it by four. A dash stands for a "
        "bit-width that the layer cannot have.</p>"
    )


def _loss_at(losses, bits):
    return losses[bits - 1] if 1 <= bits <= len(losses) else None


def _change(sign, higher, lower):
    if higher is None or lower is None:
        return DASH
    change = _percent(higher - lower)
    return change if change in ("0%", TINY) else sign + change


def _files(summary):
    rows = [
        (("name", _text(name)), ("number", f"{size:,}"), ("wrap", _text(PURPOSES[name])))
        for name, size in summary["files"].items()
    ]
    rows += [
        (("name", _text(name)), ("number", DASH), ("wrap", f"skipped: {_text(reason)}"))
        for name, reason in summary["skipped"].items()
    ]
    packed = summary["files"][PACKED] - summary["packed_bytes"]
    return (
        f"{_table(('file', '!bytes', 'purpose'), rows)}\n"
        f'<p class="note">Of the packed file, {packed:,} bytes are names and shapes.</p>'
    )


def _making(summary):
    return (
        f"<p>{summary['examples']:,} examples, {summary['steps']:,} training steps, "
        f"{summary['seconds']:.0f} s, keras_learnbits {_text(summary['version'])}.</p>\n"
        f"<pre>{_text(summary['command'])}</pre>"
    )


def _section(title, content):
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _figures(pairs):
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="figures">{cells}</dl>'


def _table(head, rows):
    """A table that scrolls by itself where it is too wide.

    Args:
        head: Sequence of titles; those of columns of numbers begin with `!`.
        rows: List of rows, sequences of pairs of a class and HTML.
    """
    titles = "".join(
        f'<th class="number">{title[1:]}</th>' if title.startswith("!") else f"<th>{title}</th>"
        for title in head
    )
    body = "\n".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr>{titles}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _text(value):
    return html.escape(str(value))


def _bytes(count):
    """A number of bytes as text, in the largest unit in which it is at least 1."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 999.5 * size
                else f"{count / size:,.0f} {unit}"
            )
    return f"{count} B"


def _percent(share):
    """A share in percent with at least two digits, without an exponent."""
    if share is None:
        return "a number that is not finite"
    percent = 100 * share
    if percent == 0 or percent == 100:
        return f"{percent:.0f}%"
    if percent < 0.001:
        return TINY
    return f"{percent:.1f}%" if percent >= 1 else f"{percent:#.2g}%"
