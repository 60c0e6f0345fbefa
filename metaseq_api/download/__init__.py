"""Getting the weights: what Meta published where, and bringing it here over lines that break.

Knows addresses, sizes and HTTP. Does not know tensors; what a file holds is read by `checkpoint`.
"""
