"""What happens between an expert's two products and after the second: SwiGLU here, the layer's own when
emitted.

Both see a block of one expert's numbers in float32: `column` is the block's columns and `inside` whether they
exist, `weight` the rows' routing weights, each shaped to broadcast; `vectors` stands for the experts' vectors
(biases) that the term reads.
"""

import triton
import triton.language as tl


@triton.jit
def weigh(weight):
    """w"""
    return weight


@triton.jit
def activate(gate, up, weight, expert, column, inside, vectors):
    """silu(gate) · up"""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def finish(down, weight, expert, column, inside, vectors):
    """down · w"""
    return down * weight


@triton.jit
def activate_shared(gate, up, column, inside, shared_vectors):
    """silu(gate) · up"""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def finish_shared(down, column, inside, shared_vectors):
    """down"""
    return down
