"""Every error this project raises on purpose, in one tree.

    MetaseqApiError                what the user can act on; its message is one line
    |- SettingsError               a flag, an environment variable or constants.py
    |  `- ParallelSizeError        a tensor-parallel size that the model does not allow
    |- CheckpointError             the files of a checkpoint
    |  |- CheckpointNotFound       nothing, or not everything, is there
    |  |- CheckpointCorrupt        a file cannot be what it claims to be
    |  `- CheckpointMismatch       the files do not belong together, or not to this model
    |- TokenizerError              vocab or merges
    |- ResourceError               this machine has not what it takes
    |  |- PortInUse
    |  `- MemoryTooSmall
    |- RankFailed                  a worker process died or stopped answering
    |- ClusterError                SLURM refused, is not there, or does not answer
    |- ServiceError                a service that was asked for by name: there is none, or it ended
    `- RequestError                what one client asked
       |- NotAuthorized, Forbidden, NotFound, MethodNotAllowed, PayloadTooLarge, UnsupportedMediaType
       |- Overloaded, RateLimited  come back later
       |- QuotaExceeded            more than this key ever gets
       |- DeadlineExceeded         the time the client gave is over
       `- EngineStopped            this server is going away
          `- NotBegun              the same, and nothing was done for this request

Knows: for each class, the exit code of a command that ends by it, and the HTTP status and wire code of an answer that
carries it. Does not know: HTTP, or who raises what.
"""

from __future__ import annotations


class MetaseqApiError(Exception):
    """Something went wrong that the user can act on."""

    exit_code = 1
    status = 500
    type = "server_error"
    code = "internal_error"


class SettingsError(MetaseqApiError):
    """A flag, an environment variable or constants.py holds something unusable."""

    exit_code = 2
    code = "settings"


class ParallelSizeError(SettingsError):
    """The model cannot be split over this many ranks."""

    exit_code = 6
    code = "parallel_size"


class CheckpointError(MetaseqApiError):
    """The files of a checkpoint cannot be used."""

    exit_code = 3
    code = "checkpoint"


class CheckpointNotFound(CheckpointError):
    """No checkpoint, or only some of its files, lies where it was looked for."""

    exit_code = 3


class CheckpointCorrupt(CheckpointError):
    """A file is truncated, damaged, or not what its name says."""

    exit_code = 4


class CheckpointMismatch(CheckpointError):
    """Files do not belong together, or not to the model they are read for."""

    exit_code = 5


class TokenizerError(MetaseqApiError):
    """The vocabulary or merges are missing, unreadable, or too large for the model."""

    exit_code = 7
    code = "tokenizer"


class ResourceError(MetaseqApiError):
    """This machine does not have what the job needs."""

    exit_code = 8
    code = "resource"


class PortInUse(ResourceError):
    """Another program listens on the port already."""

    exit_code = 9


class MemoryTooSmall(ResourceError):
    """The weights or one sequence's keys and values do not fit."""

    exit_code = 10


class RankFailed(MetaseqApiError):
    """A worker process died, or stopped answering."""

    exit_code = 20
    code = "rank_failed"


class ClusterError(MetaseqApiError):
    """SLURM refused what was asked of it, is not there, or does not answer."""

    exit_code = 30
    code = "cluster"


class ServiceError(MetaseqApiError):
    """There is no service of this name, there is one already, or it ended before it was ready."""

    exit_code = 31
    code = "service"


class RequestError(MetaseqApiError):
    """The client asked for something this server does not do.

    `param` is the field at fault as the client wrote it, or None; `retry_after_s` when the same may succeed, if known.
    """

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"
    worth_retrying = True
    """False tells clients that try again by themselves to leave it."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class NotAuthorized(RequestError):
    """No API key was sent, or none that this service knows."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(RequestError):
    """Whoever sent this may not, with any key: a page of another origin."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(RequestError):
    """No such route or model."""

    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    """The route exists for another HTTP method."""

    status = 405
    code = "method_not_allowed"


class PayloadTooLarge(RequestError):
    """The body is longer than this server reads."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(RequestError):
    """The body is neither JSON nor, where that is taken, a form."""

    status = 415
    code = "unsupported_media_type"


class Overloaded(RequestError):
    """More is asked at once than this server queues; the same request may succeed later."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class RateLimited(RequestError):
    """This key's limits are used up for now."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class QuotaExceeded(RequestError):
    """One request asks for more than its key gets in a minute; it never succeeds."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"
    worth_retrying = False


class DeadlineExceeded(RequestError):
    """The time that the client or this service allows was over before the answer was done."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    worth_retrying = False


class EngineStopped(RequestError):
    """The engine is stopping, or has failed; no answer will come from this server."""

    status = 503
    type = "server_error"
    code = "engine_stopped"


class NotBegun(EngineStopped):
    """The engine takes no more requests; this one was not begun, so that it may be sent elsewhere."""
