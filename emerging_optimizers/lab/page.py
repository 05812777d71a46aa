"""The pages that the commands leave: self-contained, loading nothing, running no script.

Every string in a page passes through `escape`, whoever it comes from.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape as escape_html
from typing import TYPE_CHECKING

from emerging_optimizers.lab.common import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 1.6rem 0 .4rem; }
.verdict { font-size: 1.15rem; } .note { color: #555; font-size: .9rem; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; } .curves figure { flex: 1 1 20rem; margin: 0; min-width: 0; }
svg { width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
details { margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) {
  .stack, .stack tbody { display: block; } .stack thead { display: none; }
  .stack tr { display: block; padding: .5rem 0; border-bottom: 1px solid #999; }
  .stack td { display: flex; justify-content: space-between; border: 0; padding: .1rem 0; white-space: normal; }
  .stack td::before { content: attr(data-label); color: #555; padding-right: 1rem; }
  .stack td:first-child { font-weight: 600; } .stack td:first-child::before { content: none; }
}
"""


def escape(text: object) -> str:
    """Make text from anywhere fit to stand in the page, between tags or in an attribute."""
    return escape_html(printable(text))


def render_page(title: str, body: str, style: str = "") -> str:
    """Make the page around a body that is escaped already."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>
<h1>{escape(title)}</h1>
{body}
</body></html>
"""


def render_table(headings: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Make a table, escaped. The kind "stack" turns into a list of cards where the page is narrow."""
    names = [escape(heading) for heading in headings]
    body = "".join(
        "<tr>" + "".join(f'<td data-label="{n}">{escape(v)}</td>' for n, v in zip(names, row, strict=True)) + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def render_svg(figure: Figure, salt: str) -> str:
    """Make an SVG element of a figure; pictures of one page need different salts."""
    import matplotlib as mpl

    text = io.StringIO()
    # Letters as paths need no font on the reader's machine; the salt keeps the pictures' ids apart and stable.
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue().partition("<svg")[2].join(["<svg", ""])


def plain_axes(axes: Axes) -> None:
    """Take away what a reader does not need."""
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2, linewidth=0.6)
