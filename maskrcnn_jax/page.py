"""Self-contained pages from Jinja2 templates: one HTML file with its tables, plots and pictures.

HTML templates extend ``templates/base.html.j2`` and use the macros of ``templates/parts.html.j2``. Templates hold all
text and markup; Python only prepares their data.
"""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from maskrcnn_jax.writing import replace_file

TEMPLATES = Path(__file__).parent / "templates"


def write_page(path: str | os.PathLike, template: Path, **data) -> None:
    """Render a template into a file.

    Args:
        path: the file; its folder is made if it does not exist.
        template: as for ``render``.
        data: likewise.

    Raises:
        UserError: if the file cannot be written.
    """
    # File names may hold what UTF-8 cannot encode.
    replace_file(path, render(template, **data).encode(errors="backslashreplace"))


def render(template: Path, **data) -> str:
    """Return the text of a page.

    Args:
        template: may use the templates beside it and those in ``TEMPLATES``. Values are escaped, except in Markdown
            (``*.md.j2``).
        data: the variables of the template. A variable that it uses but does not get is an error.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=select_autoescape(disabled_extensions=["md.j2"], default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(data)


def image_source(image: np.ndarray, *, quality: int = 85) -> str:
    """Return an image as the ``src`` of an ``img`` element.

    Args:
        image: [h, w, 3] uint8 RGB; embedded as JPEG.
        quality: of the JPEG, 1..100.
    """
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"


def svg(figure: Figure) -> Markup:
    """Return a matplotlib figure as an ``svg`` element."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text that can be searched, not outlines of letters
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    drawing = text.getvalue()
    return Markup(drawing[drawing.index("<svg") :])  # without the XML declaration, which HTML does not allow


def embed(data: Any) -> Markup:
    """Return data as JSON for a ``script`` element.

    No text in it can end the element or start another: what HTML reads as markup is written as escapes of JSON.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def pack(array: np.ndarray | list, dtype: type) -> dict[str, str]:
    """Return an array as data of ``embed``: ``unpack`` of ``templates/gallery.js`` turns it into a typed array.

    Args:
        array: of any shape; read row by row.
        dtype: int8, uint8, uint16, int32 or float32.
    """
    values = np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))
    return {"type": np.dtype(dtype).name, "base64": base64.b64encode(values.tobytes()).decode()}
