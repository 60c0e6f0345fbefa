"""What clients of metaseq, Alpa, EnergonAI and others send, and what they look for in the answer (`recorded.json`)."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from clients.conftest import Running

RECORDED: list[dict[str, Any]] = json.loads(Path(__file__).with_name("recorded.json").read_text("utf-8"))


def send(url: str, record: dict[str, Any]) -> Any:
    """The answer; of a stream its last chunk but one, which has the usage."""
    headers = dict(record.get("headers", {}))
    if "form" in record:
        body = urllib.parse.urlencode(record["form"]).encode()
    else:
        body, headers["Content-Type"] = json.dumps(record["json"]).encode(), "application/json"
    request = urllib.request.Request(url + record["path"], body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        said = answer.read().decode()
    if not record.get("stream"):
        return json.loads(said)
    *chunks, done, nothing = said.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return json.loads(chunks[-1].removeprefix("data: "))


def at(answer: Any, place: str) -> Any:
    for step in place.split("."):
        answer = answer[int(step)] if step.isdigit() else answer[step]
    return answer


def by_client(record: dict[str, Any]) -> str:
    return str(record["client"])


@pytest.mark.parametrize("record", RECORDED, ids=by_client)
@pytest.mark.parametrize("switch", ["plain", "compat"])
def test_a_client_finds_what_it_looks_for(
    record: dict[str, Any], switch: str, service: Running, compat_service: Running
) -> None:
    answer = send((compat_service if switch == "compat" else service).url, record)
    for place in record["wants"]:
        assert at(answer, place) is not None
    for place, value in record.get("is", {}).items():
        assert at(answer, place) == value
    for place, head in record.get("starts", {}).items():
        assert at(answer, place).startswith(head)
        assert len(at(answer, place)) > len(head)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a"}, "max_tokens"),
        ({"max_tokens": 1}, "prompt"),
        ({"prompt": ["a"], "max_tokens": 1}, "prompt"),
        ({"prompt": "a", "max_tokens": 1, "stop": "b"}, "stop"),
        ({"prompt": "a", "max_tokens": 100}, "max_tokens"),
    ],
)
def test_what_energonais_route_does_not_take_is_named(body: dict[str, Any], param: str, service: Running) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        send(service.url, {"path": "/generation", "json": body})
    with caught.value as answer:
        assert (answer.status, json.load(answer)["error"]["param"]) == (400, param)


def test_a_key_in_alpas_field_is_told_its_place_and_not_repeated(service: Running) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        send(service.url, {"path": "/completions", "json": {"prompt": "a", "api_key": "secret"}})
    with caught.value as answer:
        says = json.load(answer)["error"]
    assert (says["param"], "Authorization: Bearer" in says["message"]) == ("api_key", True)
    assert "secret" not in says["message"]
