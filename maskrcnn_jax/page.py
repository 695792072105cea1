"""Self-contained HTML pages: one file with its tables, plots and pictures, without scripts and without a network."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1100px;
       margin: 0 auto; padding: 1.5em 1em 4em; }
h2 { margin-top: 2.2em; border-bottom: 1px solid #d8d8d8; }
p, figcaption { max-width: 75ch; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; text-align: left; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td.number { text-align: right; }
img, svg { max-width: 100%; height: auto; }
figure { margin: 1em 0; }
figcaption { color: #555; font-size: .9em; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """Return a whole page.

    Args:
      title: plain text, of the page and its first heading.
      sections: HTML, such as the other functions here return it.
    """
    title = html.escape(title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n{body}</body></html>\n"
    )


def heading(text: str) -> str:
    """Return the heading of a section, from plain text."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return a table; numbers are aligned to the right, floats have three digits after the point.

    Args:
      header: plain text, a cell each.
      rows: of text and numbers, as long as the header.
    """

    def cell(value) -> str:
        if isinstance(value, float):
            value = f"{value:.3f}"
        elif not isinstance(value, int | np.integer):
            return f"<td>{html.escape(str(value))}</td>"
        return f'<td class="number">{value}</td>'

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(image: np.ndarray, caption: str) -> str:
    """Return a picture with a line of plain text below it.

    Args:
      image: [h, w, 3] uint8 RGB; embedded as JPEG.
      caption: also what is read out instead of the picture.
    """
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    source = f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"
    caption = html.escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def plot(figure: Figure, caption: str) -> str:
    """Return a matplotlib figure as a drawing, with a line of plain text below it."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters, which can be searched, and not their outlines
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]  # what precedes it belongs into files of their own
    return f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>"
