"""A conversation as one text: a Jinja2 template in a sandbox, as Hugging Face's chat templates are.

Knows messages that were read already. Does not know the wire (`chat`), or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from metaseq_api.errors import RequestError, SettingsError

PLAIN = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ message.content + '\\n\\n' }}
{%- else -%}
{{ ('User: ' if message.role == 'user' else 'Assistant: ') + message.content + '\\n' }}
{%- endif -%}
{%- endfor -%}
Assistant:"""
PLAIN_STOP = ("\nUser:",)
"""Where the other side would speak next."""


class ChatTemplate:
    """`source` is what clients are shown; `stop` ends an answer beside the strings they send."""

    def __init__(self, source: str, *, stop: tuple[str, ...]) -> None:
        """Raises: SettingsError where the template is no Jinja2."""
        self.source, self.stop = source, stop
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as e:
            raise SettingsError(f"the chat template cannot be read ({e}); it must be a Jinja2 template") from None

    def render(self, messages: Seq[Mapping[str, str]]) -> str:
        """The text up to where the assistant speaks; the engine puts </s> in front. Raises: RequestError."""
        about: dict[str, Any] = {
            "messages": messages,
            "add_generation_prompt": True,
            "bos_token": "",
            "eos_token": "</s>",
        }
        try:
            return self._template.render(about)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
            says = (
                f"the chat template of this server does not take these messages ({str(e)[:200]}); see /tokenizer_info"
            )
            raise RequestError(says, param="messages") from None


def load(path: Path | None) -> ChatTemplate:
    """The template in a file, or the plain one. Raises: SettingsError."""
    if path is None:
        return ChatTemplate(PLAIN, stop=PLAIN_STOP)
    try:
        source = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError(f"CHAT_TEMPLATE (--chat-template) {path} cannot be read: {e}; name a text file") from None
    return ChatTemplate(source, stop=())


def _refuse(message: str) -> NoReturn:
    """What templates call where messages are in the wrong order."""
    raise TemplateError(message)
