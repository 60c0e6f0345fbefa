"""This site's values. Edit what you need; a flag overrides a line here, and a name left out or None decides itself.

Found at --constants PATH, else $METASEQ_API_CONSTANTS, else ./constants.py. The names are metaseq's.
"""

CHECKPOINT_FOLDER = None
"""A folder of FSDP shards or of model parts, e.g. "/data/opt/175B". None serves the embedded demo model."""
BPE_VOCAB = None
BPE_MERGES = None
"""The tokenizer's files. None: gpt2-vocab.json, gpt2-merges.txt or vocab.json, merges.txt beside the checkpoint."""

MODEL_PARALLEL = None
"""GPUs that one model is split over. None: every visible GPU; 1 on a CPU."""
TOTAL_WORLD_SIZE = None
"""The same number as MODEL_PARALLEL; kept for old files."""

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 6010

MAX_SEQ_LEN = None
"""Tokens of a prompt and its completion together. None: the model's own window (2048 for OPT)."""
MAX_BATCH_TOKENS = 2048
"""Tokens fed in one step; longer prompts are prefilled in chunks of this size."""
MAX_BEAM = 16
"""Most samples (n or best_of) of one prompt."""
CACHE_TOKENS = None
"""Tokens that the KV cache of all sequences holds. None: what memory allows, on a CPU at most 4 GiB."""
PREFIX_CACHE = True
"""Whether prompts that begin alike are computed from where they differ."""
CUDA_GRAPHS = True
"""Whether a GPU replays its decode steps as CUDA graphs, made at start-up."""
RUN_AHEAD = None
"""Whether a step is started before what the one before drew has been read. None: on a GPU."""
CACHE_SIZE = 0
"""Whole answers kept for requests that are asked again and whose answer is certain (greedy, or with a seed)."""
CACHE_LIST_SIZE = 0
"""How many different answers of a request that draws at random are kept, before one of these is given. 0: none."""

GRACE_S = None
"""Seconds that running requests have at most when the service ends. None: what SLURM leaves, elsewhere 30."""
INTERFACE = None
"""Network between the nodes of one service, e.g. "ib0". None: the one that SLURM's name of the node leads to."""

METASEQ_COMPAT = False
"""Whether /completions takes and answers as metaseq did, quirks included (docs/fields.md)."""

KEYS_FILE = None
"""Hashes of API keys, written by `metaseq-api-keys --keys FILE add NAME`; a change counts without a restart."""
API_KEY_FILE = None
"""A file with one API key as it is, that only you can read; made where it is missing. Or export METASEQ_API_KEY."""
CORS_ORIGINS = None
"""Origins whose pages may call this service from a browser, e.g. "https://example.org,http://localhost:3000"."""
REQUEST_TIMEOUT_S = None
"""Most seconds that a request may take; then it ends with 504. None: as long as it takes."""
CHAT_TEMPLATE = None
"""File of a Jinja2 template for /v1/chat/completions, as Hugging Face's are. None: lines of User: and Assistant:"""
