"""How a layer's kernels are launched, for few tokens and for many.

A template: names in capitals and `**NAME` are decided per layer (codegen/lowering.py), and what is left is
the host function of the module that is printed and run. x (T, D); ids and weights (T, K), or `router`: the
logits' weight (E, D), its bias and the selection bias where the layer has them; `params` the experts'
tensors, E first; `shared` the shared experts'; `added` (T, D) is added to the result. Nothing here waits for
the GPU.
"""

# ruff: noqa: F821
import torch
import triton
import triton.language as tl  # noqa: F401  (dtypes among the constants)
from triton.tools.tensor_descriptor import TensorDescriptor

from dsmoe_compiler.codegen.kernels.combine import combine
from dsmoe_compiler.codegen.kernels.decode import decode_down, decode_up
from dsmoe_compiler.codegen.kernels.grouped_ffn import grouped_down, grouped_up
from dsmoe_compiler.codegen.kernels.grouped_ffn import grouped_down as shared_down
from dsmoe_compiler.codegen.kernels.grouped_ffn import grouped_up as shared_up
from dsmoe_compiler.codegen.kernels.permute import count, scatter
from dsmoe_compiler.codegen.kernels.route import route

_COUNTERS: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(device, count):
    """Zeros (int32) that every kernel leaves as zeros, a set for each stream.

    A captured graph has its own and writes the zeros itself: another one may be replayed before it or beside
    it, and what is kept here may be replaced while the graph is still used.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _COUNTERS.get((device, stream))
    if found is None or found.numel() < count:
        found = _COUNTERS[device, stream] = torch.zeros(count, dtype=torch.int32, device=device)
    return found


def routing(x, router):
    """The ids and weights (T, K) of every token's experts, best first."""
    T = x.shape[0]
    ids = torch.empty((T, K), dtype=torch.int32, device=x.device)
    weights = torch.empty((T, K), dtype=WEIGHT_DTYPE, device=x.device)
    if ROUTE_SPLIT:
        logits = torch.empty((T, E), dtype=torch.float32, device=x.device)
        arrivals = counters(x.device, triton.cdiv(T, ROUTE_TOKENS))
    route[(triton.cdiv(T, ROUTE_TOKENS), ROUTE_PARTS)](
        x=x,
        weight=router[0],
        bias=router[1],
        selection_bias=router[-1],
        ids=ids,
        weights=weights,
        logits=logits,
        arrivals=arrivals,
        T=T,
        **ROUTE,
    )
    return ids, weights


def grouped_layer(x, router, ids, weights, params, shared, added):
    """The layer's output (T, D): pairs sorted by expert, two grouped products, a sum over slots."""
    T = x.shape[0]
    out = torch.empty((T, WIDTH), dtype=OUT_DTYPE, device=x.device)
    if T == 0:
        return out
    if ROUTED:
        ids, weights = routing(x, router)
    P = T * K

    chunks = triton.cdiv(P, CHUNK)
    counts = torch.empty((chunks, E), dtype=torch.int32, device=x.device)
    pairs = torch.empty(P, dtype=torch.int32, device=x.device)
    offsets = torch.empty(E + 1, dtype=torch.int32, device=x.device)
    up_tiles = torch.empty((triton.cdiv(P, UP_ROWS) + E, 2), dtype=torch.int32, device=x.device)
    down_tiles = torch.empty((triton.cdiv(P, DOWN_ROWS) + E, 2), dtype=torch.int32, device=x.device)
    tile_counts = torch.empty(2, dtype=torch.int32, device=x.device)
    count[(chunks,)](ids=ids, counts=counts, P=P, **COUNT)
    scatter[(chunks,)](
        ids=ids,
        counts=counts,
        pairs=pairs,
        offsets=offsets,
        up_tiles=up_tiles,
        down_tiles=down_tiles,
        tile_counts=tile_counts,
        P=P,
        chunks=chunks,
        **SCATTER,
    )

    h = torch.empty((P, F), dtype=H_DTYPE, device=x.device)
    up_weight = params[UP_PARAM]
    if UP_TMA:
        up_weight = TensorDescriptor.from_tensor(up_weight, UP_BLOCK)
    if GATED:
        if GATE_PARAM == UP_PARAM:
            gate_weight = up_weight
        else:
            gate_weight = params[GATE_PARAM]
            if UP_TMA:
                gate_weight = TensorDescriptor.from_tensor(gate_weight, UP_BLOCK)
    grouped_up[(PROGRAMS,)](
        x=x,
        weights=weights,
        gate_weight=gate_weight,
        up_weight=up_weight,
        h=h,
        pairs=pairs,
        offsets=offsets,
        tiles=up_tiles,
        tile_counts=tile_counts,
        T=T,
        **UP,
    )

    y = torch.empty((P, WIDTH), dtype=Y_DTYPE, device=x.device)
    down_weight = params[DOWN_PARAM]
    if DOWN_TMA:
        h = TensorDescriptor.from_tensor(h, H_BLOCK)
        down_weight = TensorDescriptor.from_tensor(down_weight, DOWN_BLOCK)
    grouped_down[(PROGRAMS,)](
        h=h,
        weights=weights,
        down_weight=down_weight,
        y=y,
        pairs=pairs,
        offsets=offsets,
        tiles=down_tiles,
        tile_counts=tile_counts,
        T=T,
        **DOWN,
    )

    if SHARED:
        added = torch.empty((T, WIDTH), dtype=SHARED_DTYPE, device=x.device)
        shared_h = torch.empty((T, SHARED_F), dtype=SHARED_H_DTYPE, device=x.device)
        shared_up_weight = shared[SHARED_UP_PARAM].unsqueeze(0)
        shared_down_weight = shared[SHARED_DOWN_PARAM].unsqueeze(0)
        if SHARED_UP_TMA:
            shared_up_weight = TensorDescriptor.from_tensor(shared_up_weight, SHARED_UP_BLOCK)
        if SHARED_GATED:
            if SHARED_GATE_PARAM == SHARED_UP_PARAM:
                shared_gate_weight = shared_up_weight
            else:
                shared_gate_weight = shared[SHARED_GATE_PARAM].unsqueeze(0)
                if SHARED_UP_TMA:
                    shared_gate_weight = TensorDescriptor.from_tensor(shared_gate_weight, SHARED_UP_BLOCK)
        shared_up[(SHARED_PROGRAMS,)](
            x=x,
            gate_weight=shared_gate_weight,
            up_weight=shared_up_weight,
            h=shared_h,
            T=T,
            **SHARED_UP,
        )
        if SHARED_DOWN_TMA:
            shared_h = TensorDescriptor.from_tensor(shared_h, SHARED_H_BLOCK)
            shared_down_weight = TensorDescriptor.from_tensor(shared_down_weight, SHARED_DOWN_BLOCK)
        shared_down[(SHARED_PROGRAMS,)](
            h=shared_h,
            down_weight=shared_down_weight,
            y=added,
            T=T,
            **SHARED_DOWN,
        )

    combine[(T, triton.cdiv(WIDTH, COMBINE_COLUMNS))](y=y, ids=ids, shared=added, out=out, **COMBINE)
    return out


def decode_layer(x, router, ids, weights, params, shared, added):
    """The layer's output (T, D) for a few tokens: each pair's matrices times a vector, nothing sorted."""
    T = x.shape[0]
    out = torch.empty((T, WIDTH), dtype=OUT_DTYPE, device=x.device)
    if T == 0:
        return out
    if ROUTED:
        ids, weights = routing(x, router)
    P = T * K

    h = torch.empty((P, F), dtype=H_DTYPE, device=x.device)
    if SHARED:
        shared_h = torch.empty((T, SHARED_F), dtype=SHARED_H_DTYPE, device=x.device)
        programs = P + T
    else:
        programs = P
    if SPLIT > 1:
        parts = torch.empty((P * UP_BLOCKS, 2, SPLIT, UP_COLUMNS), dtype=torch.float32, device=x.device)
        arrived = counters(x.device, P * UP_BLOCKS)
    decode_up[(programs, UP_BLOCKS, SPLIT)](
        x=x,
        ids=ids,
        weights=weights,
        gate_weight=params[GATE_PARAM],
        up_weight=params[UP_PARAM],
        h=h,
        shared_gate_weight=shared[SHARED_GATE_PARAM],
        shared_up_weight=shared[SHARED_UP_PARAM],
        shared_h=shared_h,
        parts=parts,
        arrived=arrived,
        pairs=P,
        **UP,
    )
    decode_down[(T, triton.cdiv(WIDTH, DOWN_COLUMNS))](
        h=h,
        ids=ids,
        weights=weights,
        down_weight=params[DOWN_PARAM],
        shared_h=shared_h,
        shared_weight=shared[SHARED_DOWN_PARAM],
        shared_out=added,
        out=out,
        **DOWN,
    )
    return out
