"""Serve OPT-family checkpoints over HTTP, straight from the FSDP shards a trainer left behind."""

__version__ = "0.1.0"
