"""What is measured beside the tests. Imports neither fairscale nor flask; does not print.

engine     tokens a second, beside Hugging Face's
reshard    how fast shards are joined, and in how much memory, beside cp
load       how fast ranks read a checkpoint to serve it, beside a plain read of the same bytes
"""
