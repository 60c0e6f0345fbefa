"""What may be shown of an address, and where redirects may lead."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from email.message import Message

import pytest

from metaseq_api.download.web import Web, _Redirect, shown
from metaseq_api.errors import ResourceError


def test_host_and_path_are_shown_and_nothing_else() -> None:
    assert shown("https://me:secret@host:8/a/b.pt?key=secret#secret") == "host:8/a/b.pt"


@pytest.mark.parametrize(
    ("from_", "to", "followed"),
    [("https", "https", True), ("http", "http", True), ("http", "https", True), ("https", "http", False)],
)
def test_a_redirect_may_add_encryption_but_not_drop_it(from_: str, to: str, followed: bool) -> None:
    request = urllib.request.Request(f"{from_}://a/x", headers={"Range": "bytes=5-"})
    if followed:
        found = _Redirect().redirect_request(request, None, 302, "", Message(), f"{to}://b/y")
        assert (found.full_url, found.get_header("Range")) == (f"{to}://b/y", "bytes=5-")
    else:
        with pytest.raises(urllib.error.HTTPError) as refusal:
            _Redirect().redirect_request(request, None, 302, "", Message(), f"{to}://b/y")
        refusal.value.close()


def test_a_host_that_does_not_exist_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ResourceError, match=r"^nowhere.invalid/x: there is no such host"):
        Web().ask("http://nowhere.invalid/x?secret", 0)
