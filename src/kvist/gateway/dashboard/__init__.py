"""The dashboard's page: one document, put together from the files of this folder; no build step.

`POLICY` is its content security policy: no asset from elsewhere can be loaded, whatever the page says.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


@cache
def page() -> bytes:
    """The whole page as UTF-8."""
    folder = resources.files(__name__)
    text = folder.joinpath("index.html").read_text(encoding="utf-8")
    for name in ("style.css", "format.js", "chart.js", "app.js"):
        text = text.replace(f"/* {name} */", folder.joinpath(name).read_text(encoding="utf-8"))
    return text.encode()
