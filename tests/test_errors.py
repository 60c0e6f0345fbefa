"""Each error class has its exit code, status and wire code, and they are told apart."""

from __future__ import annotations

import pytest

from metaseq_api import errors

CLASSES = {c.__name__: c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)}
TABLE = {
    # class: (exit code, HTTP status, wire type, wire code)
    "MetaseqApiError": (1, 500, "server_error", "internal_error"),
    "SettingsError": (2, 500, "server_error", "settings"),
    "ParallelSizeError": (6, 500, "server_error", "parallel_size"),
    "CheckpointError": (3, 500, "server_error", "checkpoint"),
    "CheckpointNotFound": (3, 500, "server_error", "checkpoint"),
    "CheckpointCorrupt": (4, 500, "server_error", "checkpoint"),
    "CheckpointMismatch": (5, 500, "server_error", "checkpoint"),
    "TokenizerError": (7, 500, "server_error", "tokenizer"),
    "ResourceError": (8, 500, "server_error", "resource"),
    "PortInUse": (9, 500, "server_error", "resource"),
    "MemoryTooSmall": (10, 500, "server_error", "resource"),
    "RankFailed": (20, 500, "server_error", "rank_failed"),
    "ClusterError": (30, 500, "server_error", "cluster"),
    "ServiceError": (31, 500, "server_error", "service"),
    "RequestError": (1, 400, "invalid_request_error", "invalid_value"),
    "NotAuthorized": (1, 401, "authentication_error", "invalid_api_key"),
    "Forbidden": (1, 403, "permission_error", "forbidden"),
    "NotFound": (1, 404, "invalid_request_error", "not_found"),
    "MethodNotAllowed": (1, 405, "invalid_request_error", "method_not_allowed"),
    "PayloadTooLarge": (1, 413, "invalid_request_error", "payload_too_large"),
    "UnsupportedMediaType": (1, 415, "invalid_request_error", "unsupported_media_type"),
    "Overloaded": (1, 429, "rate_limit_error", "overloaded"),
    "RateLimited": (1, 429, "rate_limit_error", "rate_limit_exceeded"),
    "QuotaExceeded": (1, 429, "insufficient_quota", "insufficient_quota"),
    "DeadlineExceeded": (1, 504, "timeout_error", "deadline_exceeded"),
    "EngineStopped": (1, 503, "server_error", "engine_stopped"),
    "NotBegun": (1, 503, "server_error", "engine_stopped"),
}


def test_the_table_is_complete() -> None:
    assert set(TABLE) == set(CLASSES)


@pytest.mark.parametrize("name", TABLE)
def test_a_class_has_its_codes_and_is_explained(name: str) -> None:
    cls = CLASSES[name]
    assert (cls.exit_code, cls.status, cls.type, cls.code) == TABLE[name]
    assert cls.__doc__
    assert name in (errors.__doc__ or "")
