"""What a program of openai 0.28 does, run by a Python that has it: old_openai.py URL; prints one JSON object."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any


def main(url: str) -> dict[str, Any]:
    import openai  # type: ignore[import-not-found,unused-ignore]

    old: Any = openai
    old.api_key, old.api_base = "EMPTY", f"{url}/v1"
    same = {"prompt": "the end", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    said: dict[str, Any] = {"version": old.__version__}
    said["model"] = old.Completion.create(model="any", **same)["choices"][0]["text"]
    said["engine"] = old.Completion.create(engine="175b", **same).choices[0].text
    said["streamed"] = "".join(c.choices[0].text for c in old.Completion.create(model="any", stream=True, **same))
    said["streamed by engine"] = "".join(
        c.choices[0].text for c in old.Completion.create(engine="x", stream=True, **same)
    )
    full = old.Completion.create(
        model="any", n=2, logprobs=2, echo=True, stop=["\n"], seed=1, **(same | {"temperature": 1})
    )
    said["choices"] = [c.text for c in full.choices]
    said["offsets"] = full.choices[0].logprobs.text_offset
    said["usage"] = full.usage.total_tokens
    said["models"] = [m.id for m in old.Model.list().data]

    async def async_text() -> str:
        whole = (await old.Completion.acreate(model="any", **same)).choices[0].text
        parts = [c.choices[0].text async for c in await old.Completion.acreate(model="any", stream=True, **same)]
        return whole if "".join(parts) == whole else "another"

    said["async"] = asyncio.run(async_text())
    try:
        old.Completion.create(model="any", prompt="a", max_tokens=1000)
    except old.error.InvalidRequestError as e:
        said["error"] = {"param": e.param, "code": e.code, "status": e.http_status, "says": e.user_message}
    old.api_base = url  # as for metaseq, which had no /v1
    said["metaseq's base"] = old.Completion.create(engine="175b", **same).choices[0].text
    return said


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
