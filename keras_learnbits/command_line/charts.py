"""Charts of bit-widths in HTML and SVG, in the colours of the page."""

import html

HEIGHT = 100
# Smallest range of the axis in bits, so that bars of low bit-widths are short.
LOWEST_AXIS = 4


def bar(bits, highest):
    """A bar as long as a bit-width.

    Args:
        bits: Integer.
        highest: Integer, the bit-width of a full bar.

    Returns:
        String of HTML, with the number.
    """
    share = 100 * bits / highest
    return f'<div class="bar"><b>{bits}</b><span><i style="width:{share:.1f}%"></i></span></div>'


def width_chart(bits, weights, mean):
    """A chart with a block for each layer: its width is the share of weights, its height the bits.

    Args:
        bits: Dictionary of layer to integer.
        weights: Dictionary of layer to the number of its weights.
        mean: Mean bits per weight.

    Returns:
        String of HTML with an inline SVG picture.
    """
    highest = max(LOWEST_AXIS, *bits.values())
    total = sum(weights.values())
    left, blocks = 0.0, []
    for layer, width in bits.items():
        share = 100 * weights[layer] / total
        height = HEIGHT * width / highest
        title = html.escape(f"{layer}: {width} bits, {share:.1f}% of the weights")
        blocks.append(
            f'<rect x="{left:.3f}" y="{HEIGHT - height:.2f}" width="{share:.3f}" '
            f'height="{height:.2f}"><title>{title}</title></rect>'
        )
        left += share
    ticks = _ticks(highest)
    lines = "".join(_line(tick, highest) for tick in ticks)
    numbers = "".join(f"<li>{tick}</li>" for tick in reversed(ticks))
    label = html.escape(f"Bit-widths of {len(bits)} layers, {mean:.2f} on average")
    return (
        f'<div class="chart"><ol>{numbers}</ol>\n'
        f'<svg viewBox="0 0 100 {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{lines}{"".join(blocks)}{_line(mean, highest, "mean")}</svg>\n'
        "<p><span>0%</span><span>of the weights</span><span>100%</span></p></div>"
    )


def _ticks(highest):
    """Evenly spaced bit-widths from 0 to the highest: all of them if they are few."""
    step = next(
        step for step in (1, 2, 3, 4, 5, highest) if highest % step == 0 and highest // step <= 6
    )
    return list(range(0, highest + 1, step))


def _line(bits, highest, kind="tick"):
    y = HEIGHT * (1 - bits / highest)
    return f'<line class="{kind}" x1="0" x2="100" y1="{y:.2f}" y2="{y:.2f}"/>'
