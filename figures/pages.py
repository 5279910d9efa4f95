"""Pieces of reports: Markdown and HTML tables, and the parts of self-contained pages."""

import base64
import html
from pathlib import Path

STYLE = """
:root { --ink: #1c2530; --soft: #5b6875; --line: #d9dfe5; --page: #fbfcfd; }
body {
  font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem;
}
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
p.lead { color: var(--soft); }
h1 + p.lead { margin-top: 0; }
/* a table that is wider than the page is moved sideways, its numbers stay on one line */
div.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
td { white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
td.rate { font-weight: 600; }
small { color: var(--soft); font-weight: 400; }
img { max-width: 100%; }
video { width: 300px; background: #000; border-radius: 4px; }
/* as wide as its film, a longer caption breaks: films stand side by side */
figure {
  display: inline-block; width: min-content; vertical-align: top; margin: .4rem .6rem .4rem 0;
}
figcaption { font-size: .82rem; color: var(--soft); }
pre {
  background: #eef2f5; padding: .7rem; overflow-x: auto; font-size: .82rem;
  border-radius: 4px; white-space: pre-wrap;
}
"""


def embed(path, kind):
    """A file as a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def percent(value, interval):
    """A success rate with its interval, as text."""
    return f"{100 * value:.0f}% ({100 * interval[0]:.0f}-{100 * interval[1]:.0f})"


def markdown_table(head, rows):
    """A Markdown table of cells that are strings or numbers."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def rate(value, interval):
    """A success rate with its interval, as table cell text."""
    if value is None:
        return "-"
    return f"{100 * value:.0f}% <small>{100 * interval[0]:.0f}-{100 * interval[1]:.0f}</small>"


def html_table(head, rows, strong=()):
    """An HTML table of cells that are HTML already; columns `strong` stand out."""
    # callers escape: a cell may hold markup, as <small>
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    for row in rows:
        kinds = [" class=rate" if i in strong else "" for i in range(len(row))]
        lines.append("".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row)))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=table><table>{body}</table></div>"


def figure(video, caption):
    """A video file with its caption."""
    return (
        f'<figure><video controls loop muted src="{embed(video, "video/mp4")}"></video>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
