"""The nouns that every layer shares: plain frozen data, no tensors, no third party.

request    what a client asked           (Request, SamplingParams)
sequence   one prompt being continued    (Sequence; the Scheduler alone changes it)
batch      the order for one step        (Batch, BatchItem)
completion what goes back                (Completion, Delta, FinishReason, RankedToken, TokenLogprobs)
config     the shape of a model          (ModelConfig)
stats      what the engine counts         (Stats, Histogram)
protocols  how the server sees the engine (EngineProtocol, Answer)
"""

from metaseq_api.core.batch import Batch, BatchItem
from metaseq_api.core.completion import Completion, Delta, FinishReason, RankedToken, TokenLogprobs
from metaseq_api.core.config import ModelConfig
from metaseq_api.core.protocols import Answer, EngineProtocol, Health
from metaseq_api.core.request import Request, SamplingParams
from metaseq_api.core.sequence import Sequence, Status
from metaseq_api.core.stats import Histogram, Stats

__all__ = [
    "Answer",
    "Batch",
    "BatchItem",
    "Completion",
    "Delta",
    "EngineProtocol",
    "FinishReason",
    "Health",
    "Histogram",
    "ModelConfig",
    "RankedToken",
    "Request",
    "SamplingParams",
    "Sequence",
    "Stats",
    "Status",
    "TokenLogprobs",
]
