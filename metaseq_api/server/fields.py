"""Values of a request body, read strictly: each has its JSON type, or one line says which field has not.

Knows JSON and forms. Does not know which fields there are or what they mean; `schema` does.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from metaseq_api.errors import RequestError

_KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "an array", dict: "an object"}
_EXAMPLE = 'a JSON object such as {"prompt": "Hello", "max_tokens": 16}'


def found(value: Any) -> str:
    """A value as an error message shows it: short, with its kind."""
    kind = _KINDS.get(type(value), "null")
    if isinstance(value, (list, dict)):
        return f"{kind} of {len(value)}"
    shown = json.dumps(value)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    return shown if kind in ("null", "a number") else f"{shown} ({kind})"


def _quoted(name: str) -> str:
    return json.dumps(name if len(name) <= 40 else f"{name[:37]}...")


def wrong(name: str, value: Any, wanted: str) -> RequestError:
    """The error that says what the field `name` (or an element of it, as prompt[3]) holds and what it must be."""
    return RequestError(f"{name} is {found(value)}; it must be {wanted}", param=name.partition("[")[0])


def read_json(raw: bytes) -> dict[str, Any]:
    """The one object a body holds. Of a key given twice the last one counts, as everywhere.

    Raises: RequestError where it is not UTF-8, not JSON, not finite, nested too deep, or not an object.
    """

    def refuse_constant(name: str) -> NoReturn:
        raise RequestError(f"the body holds {name}, which JSON has not; send a number or null", code="invalid_json")

    try:
        body = json.loads(raw.decode("utf-8-sig"), parse_constant=refuse_constant)
    except UnicodeDecodeError as e:
        raise RequestError(f"the body is not UTF-8 at byte {e.start}; send UTF-8", code="invalid_json") from None
    except json.JSONDecodeError as e:
        what = f"not JSON ({e.msg}, line {e.lineno} column {e.colno})" if raw.strip() else "empty"
        raise RequestError(f"the body is {what}; send {_EXAMPLE}", code="invalid_json") from None
    except RecursionError:
        raise RequestError(f"the body is nested too deep; send {_EXAMPLE}", code="invalid_json") from None
    except ValueError:  # Python refuses integers of thousands of digits
        raise RequestError("the body holds a number of too many digits; shorten it", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body is {found(body)}; it must be {_EXAMPLE}", code="invalid_json")
    return body


def read_form(values: Mapping[str, list[str]], texts: Collection[str], lists: Collection[str]) -> dict[str, Any]:
    """The fields of a form with the types JSON would give them; an empty input, but for `texts`, was not filled in.

    texts: fields that stay text whatever they look like. lists: fields that may come several times.
    Raises: RequestError where another field comes twice.
    """
    out: dict[str, Any] = {}
    for name, given in values.items():
        if len(given) > 1 and name not in lists:
            raise RequestError(f"{_quoted(name)} is given {len(given)} times; send it once", param=name)
        if name in texts or name in lists:
            out[name] = given if len(given) > 1 else given[0]
        elif given[0].strip():
            out[name] = _scalar(given[0].strip())
    return out


def _scalar(word: str) -> Any:
    """A form's text as the number or boolean it spells, else as it is, for the field's own reader to refuse."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for number_type in (int, float):
        try:
            return number_type(word)
        except ValueError:
            continue
    return word


def text(name: str, value: Any) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise RequestError(
            f"{name} holds half a surrogate pair at character {e.start}; send whole characters",
            param=name.partition("[")[0],
        ) from None
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def integer(name: str, value: Any) -> int:
    """A whole number; 16.0 is one, as JavaScript writes it, "16" and true are not."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not (isinstance(value, float) and value.is_integer()):
        raise wrong(name, value, "a whole number")
    return int(value)


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong(name, value, "a number")
    try:
        as_float = float(value)
    except OverflowError:
        as_float = math.inf
    if not math.isfinite(as_float):
        raise wrong(name, value, "a finite number")
    return as_float


def strings(name: str, value: Any) -> tuple[str, ...]:
    """One string, or an array of strings."""
    if isinstance(value, str):
        return (text(name, value),)
    if not isinstance(value, list):
        raise wrong(name, value, "a string or an array of strings")
    return tuple(text(f"{name}[{i}]", v) for i, v in enumerate(value))


def integers(name: str, value: Any) -> tuple[int, ...]:
    """An array of whole numbers."""
    if not isinstance(value, list):
        raise wrong(name, value, "an array of whole numbers")
    return tuple(integer(f"{name}[{i}]", v) for i, v in enumerate(value))


def biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """An object of token id: number, as pairs in the order of ids; JSON spells the ids as strings."""
    if not isinstance(value, dict):
        raise wrong(name, value, 'an object of token id: number, as {"50118": -100}')
    out: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise RequestError(f"{name} has the key {_quoted(key)}; its keys must be token ids", param=name)
        if int(key) in out:
            raise RequestError(f"{name} has two numbers for token {int(key)}; send one", param=name)
        out[int(key)] = number(f"{name}[{key}]", bias)
    return tuple(sorted(out.items()))


def refuse_unknown(body: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises: RequestError naming the first field that is none of `known`, and its nearest neighbour."""
    for name in body:
        if name not in known:
            near = difflib.get_close_matches(name[:64], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise RequestError(f"there is no field {_quoted(name)}; {hint}", param=name[:64], code="unknown_field")
