"""What is recognised in other people's models: one pattern a file, each `rewrite(node)`.

It returns the node that it put in, or one sentence about a near miss, or None for a node that is
none of its business; no_op alone returns the name of what it took out. Norms grow step by step:
group_norm and rms_norm put in an op with no activation, and modulate, silu, cast, add and pair each
take in one neighbour of it.
"""

from . import add, attention, cast, group_norm, modulate, no_op, pair, rms_norm, sdpa, silu

# In this order; twice where an earlier step makes room for more.
ORDER = (
    no_op,
    group_norm,
    rms_norm,
    cast,
    no_op,
    modulate,
    silu,
    cast,
    no_op,
    add,
    pair,
    sdpa,
    attention,
    no_op,
)
