"""The document says what the app does: generated requests find no difference, and no field is left out."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from support.fake_engine import FakeEngine

from metaseq_api.server import chat, openapi, schema, tokens
from metaseq_api.server.app import create_app
from metaseq_api.settings import Settings

SETTINGS = Settings(max_beam=4, max_queue=100)
APP = create_app(FakeEngine(), SETTINGS)
DOCUMENT = schemathesis.openapi.from_wsgi("/openapi.json", APP)
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
"""All but that every body within the schema is answered 200: what two fields say together no schema tells."""


def test_every_field_that_is_read_is_described_and_no_other() -> None:
    schemas = openapi.document(FakeEngine(), SETTINGS)["components"]["schemas"]
    for name, known in (
        ("CompletionRequest", schema.COMPLETION_FIELDS),
        ("GenerateRequest", schema.GENERATE_FIELDS),
        ("ChatRequest", chat.FIELDS),
        ("LogprobsRequest", tokens.LOGPROBS),
        ("TokenizeRequest", tokens.TOKENIZE),
        ("DetokenizeRequest", tokens.DETOKENIZE),
    ):
        assert set(schemas[name]["properties"]) == set(known), name


def test_every_route_but_metaseqs_other_spellings_is_described() -> None:
    described = {path.replace("{model}", "<path:model>") for path in openapi.document(FakeEngine(), SETTINGS)["paths"]}
    left_out = {rule.rule for rule in APP.url_map.iter_rules()} - described
    assert {rule for rule in left_out if "<path:engine>" not in rule} == {"/chat/completions"}


@DOCUMENT.parametrize()
@hypothesis_settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_generated_requests_find_no_difference(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)
