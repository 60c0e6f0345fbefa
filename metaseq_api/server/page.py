"""The page at `/`: one file, and what a browser is told it may do.

Knows the file. Does not know routes, or what the page asks them for.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def read() -> str:
    """The page as it is sent; nothing in it is filled in."""
    return importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")


def policy(html: str) -> str:
    """The Content-Security-Policy under which `html` works and nothing else does.

    Its own script and style are allowed by their hashes: whatever a text might smuggle into the page does not run.
    """
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, source in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    assert hashes["script"], "the page has lost its script"
    assert hashes["style"], "the page has lost its style"
    return (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
