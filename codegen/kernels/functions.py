"""The functions of one number that bodies apply and Triton has no word for, in float32.

Each is torch's function of the same name; where its parameters are named they are torch's, too.
"""

import triton
import triton.language as tl


@triton.jit
def silu(a):
    """a · σ(a)"""
    return a * tl.sigmoid(a)


@triton.jit
def tanh(a):
    """(1 − exp(−2|a|)) / (1 + exp(−2|a|)) with a's sign, exact near 0, where 2 σ(2a) − 1 is a's rounding"""
    u = expm1(-2.0 * tl.abs(a))
    size = -u / (2.0 + u)
    return tl.where(a < 0.0, -size, size)


@triton.jit
def gelu(a):
    """a · Φ(a), Φ the normal distribution"""
    return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))


@triton.jit
def gelu_tanh(a):
    """a · (1 + tanh(√(2/π) (a + 0.044715 a³))) / 2, which is a · σ of twice the bracket"""
    return a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))


@triton.jit
def log1p(a):
    """log(1 + a), exact where 1 + a rounds (Goldberg, theorem 4)"""
    u = 1.0 + a
    return tl.where((u == 1.0) | (u == float("inf")), a, tl.log(u) * (a / (u - 1.0)))


@triton.jit
def expm1(a):
    """exp(a) − 1, exact where exp(a) rounds to nearly 1 (Kahan)"""
    u = tl.exp(a)
    small = tl.where(u == 1.0, a, (u - 1.0) * a / tl.log(u))
    return tl.where((a > -0.5) & (a < 0.5), small, u - 1.0)


@triton.jit
def log_sigmoid(a):
    """min(a, 0) − log(1 + exp(−|a|))"""
    return tl.minimum(a, 0.0) - log1p(tl.exp(-tl.abs(a)))


@triton.jit
def softplus(a, beta, threshold):
    """log(1 + exp(βa)) / β, a itself where βa is above the threshold"""
    scaled = a * beta
    low = tl.minimum(scaled, threshold, tl.PropagateNan.ALL)
    return tl.where(scaled > threshold, a, log1p(tl.exp(low)) / beta)


@triton.jit
def mish(a):
    """a · tanh(softplus(a))"""
    return a * tanh(softplus(a, 1.0, 20.0))


@triton.jit
def elu(a, alpha, scale, input_scale):
    """scale · a above 0, scale · α (exp(a · input_scale) − 1) below"""
    low = tl.minimum(a, 0.0, tl.PropagateNan.ALL)
    return tl.where(a > 0.0, a, alpha * expm1(low * input_scale)) * scale


@triton.jit
def sign(a):
    """1, 0 or −1"""
    return (a > 0.0).to(tl.float32) - (a < 0.0).to(tl.float32)


@triton.jit
def clamp(a, low, high):
    """a, not below `low`, and then not above `high`; NaN stays NaN"""
    return tl.minimum(tl.maximum(a, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)
