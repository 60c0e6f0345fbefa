"""/docs: the OpenAPI document as one plain page, without script and without anything from another host.

Knows the document's shape. Does not know what it says.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-top: 1px solid #8884; padding-top: 1rem; font-size: 1.15rem }
h2 b { font-family: ui-monospace, monospace }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8883 }
code, pre { font-family: ui-monospace, monospace; font-size: .9em }
pre { overflow-x: auto; padding: .6rem; background: #8882; border-radius: .3rem }
"""


def render(document: Mapping[str, Any]) -> str:
    """The page."""
    info = document["info"]
    title = html.escape(f"{info['title']} {info['version']}")
    operations = [
        _operation(document, method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main><h1>{title}</h1><p>{html.escape(info['description'])}</p>"
        f'<p>The same for programs: <a href="openapi.json">openapi.json</a></p>'
        f"{''.join(operations)}</main></body></html>\n"
    )


def _operation(document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]) -> str:
    parts = [f"<h2><b>{method.upper()} {html.escape(path)}</b></h2><p>{html.escape(operation['summary'])}</p>"]
    for content_type, media in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<h3>Body, {html.escape(content_type)}</h3>{_table(document, media['schema'])}")
        if "example" in media:
            parts.append(f"<pre>{html.escape(json.dumps(media['example']))}</pre>")
    answers = "".join(
        f"<tr><td><code>{status}</code></td><td>{html.escape(response['description'])}</td></tr>"
        for status, response in operation["responses"].items()
    )
    return "".join([*parts, f"<h3>Answers</h3><table>{answers}</table>"])


def _table(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    schema, needed = _followed(document, schema), _followed(document, schema).get("required", [])
    rows = (
        f"<tr><td><code>{html.escape(name)}</code>{' (needed)' if name in needed else ''}</td>"
        f"<td>{html.escape(' or '.join(dict.fromkeys(_kinds(of))))}</td>"
        f"<td>{html.escape(of.get('description', ''))}</td></tr>"
        for name, of in schema.get("properties", {}).items()
    )
    return f"<table><tr><th>field</th><th>is</th><th></th></tr>{''.join(rows)}</table>"


def _followed(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema, or what its $ref names."""
    found: Any = document
    for word in schema["$ref"].removeprefix("#/").split("/") if "$ref" in schema else ():
        found = found[word]
    return schema if "$ref" not in schema else found


def _kinds(schema: Mapping[str, Any]) -> Iterator[str]:
    """The types a value may have, with their bounds; null goes without saying."""
    for other in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _kinds(other)
    for value in schema.get("enum", ()):
        if value is not None:
            yield json.dumps(value)
    types = schema.get("type", ())
    low, high = schema.get("minimum"), schema.get("maximum")
    bounds = f" {'' if low is None else low}..{'' if high is None else high}" if (low, high) != (None, None) else ""
    for kind in [types] if isinstance(types, str) else types:
        if kind == "array" and "items" in schema:
            yield f"array of {' or '.join(dict.fromkeys(_kinds(schema['items'])))}"
        elif kind != "null":
            yield kind + bounds
