"""The CPU's own kernels: operations on rows whose bits depend on the row alone, because of how they are written.

Each takes its rows one by one, or in blocks whose arithmetic is that of a single row; sums go in one order; nothing
is left to a library that chooses by shape. Addresses and sizes are int64. E is the model's dtype, float32 or bfloat16;
rows lie without gaps. `lanes` is what they are written in, `compiled` is how they are called.
"""

PANEL = 64  # outputs that lie together in a large weight
ROWS = 4  # that a product with a small weight takes at a time
TILE = 64  # rows that a large product takes through such a panel while it is in the cache
ARITHMETIC = 1  # goes up with every change that gives other bits: what was begun with others is not gone on with
