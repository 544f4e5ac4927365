"""A layer and its plan as a module of kernels: which are launched, and what is known in each."""

from __future__ import annotations

import textwrap

from dsmoe_compiler.codegen.bound_ffn import BoundFfn, routed_experts, shared_experts
from dsmoe_compiler.codegen.choice import Choice
from dsmoe_compiler.codegen.emit import Code
from dsmoe_compiler.codegen.ffn import Unsupported
from dsmoe_compiler.codegen.gpu import Gpu
from dsmoe_compiler.codegen.layer import Layer
from dsmoe_compiler.codegen.library import source
from dsmoe_compiler.codegen.operand import SIZES
from dsmoe_compiler.codegen.pointwise import NoExpression
from dsmoe_compiler.codegen.route_flags import weights_dtype
from dsmoe_compiler.codegen.routing_tiles import RouteTiles, combine_columns, permute_tiles, route_tiles
from dsmoe_compiler.codegen.specialize import Root, module_text
from dsmoe_compiler.codegen.tiles import GROUP, Decode, GemmTiles, GemvTiles, Grouped


def module_of(layer: Layer, choice: Choice) -> str:
    """The layer's module as chosen, whose host function is `layer`. Raises Unsupported when there are no
    kernels.
    """
    doc = _title(layer, choice)
    try:
        if isinstance(choice.plan, Decode):
            return _decode(layer, choice.tokens, choice.gpu, choice.plan, doc)
        return _grouped(layer, choice.tokens, choice.gpu, choice.plan, choice.shared, doc)
    except NoExpression as e:
        raise Unsupported(str(e)) from e


def _title(layer: Layer, choice: Choice) -> str:
    """What a module's first lines say."""
    router = f"{layer.router} | " if layer.router else ""
    shared = f" | {layer.shared}" if layer.shared else ""
    what = (
        f"E={layer.experts.count} K={layer.top_k} {router}{layer.experts}{shared}, {layer.params[0].dtype}."
    )
    tokens = "1 token" if choice.tokens == 1 else f"up to {choice.tokens} tokens"
    where = f"For {tokens} on {choice.gpu.name} ({choice.gpu.target})."
    return "\n".join([*textwrap.wrap(what, 100), "", where]) + "\n"


def _grouped(
    layer: Layer, tokens: int, gpu: Gpu, plan: Grouped, shared_plan: Grouped | None, doc: str
) -> str:
    experts, shared = routed_experts(layer), shared_experts(layer)
    routing = _route_tiles(layer, tokens, gpu) if layer.router else None
    permute = permute_tiles(tokens * layer.top_k)
    known: dict[str, object] = {"E": layer.experts.count, "E_PAD": _power(layer.experts.count)}
    known["CHUNK"] = permute.chunk
    sizes = {"BLOCK": permute.block, "COUNT_ROWS": permute.count_rows, "TILES": permute.tiles}
    rows = {"UP_ROWS": plan.up.rows, "DOWN_ROWS": plan.down.rows}
    roots = {"route": _route_root(layer, routing)} if routing else {}
    roots["count"] = Root("permute", "count", known, {"num_warps": permute.count_warps})
    roots["scatter"] = Root("permute", "scatter", known | sizes | rows, {"num_warps": permute.scatter_warps})
    roots["grouped_up"] = _up_root(experts, plan.up, layer.top_k, True)
    roots["grouped_down"] = _down_root(experts, plan.down, True)
    columns = combine_columns(experts.width_out)
    summed = {"E": layer.experts.count, "K": layer.top_k, "D": experts.width_out, "BLOCK_D": columns}
    has = layer.shared is not None
    roots["combine"] = Root("combine", "combine", summed | {"HAS_SHARED": has}, {"num_warps": 4})
    constants = _host_constants(layer, experts, routing) | {
        "CHUNK": permute.chunk,
        "UP_ROWS": plan.up.rows,
        "DOWN_ROWS": plan.down.rows,
        "PROGRAMS": plan.programs,
        "COMBINE_COLUMNS": columns,
        **_descriptors("", experts, plan.up, plan.down),
        "SHARED": shared is not None,
    }
    if shared:
        assert shared_plan is not None
        roots["shared_up"] = _up_root(shared, shared_plan.up, 1, False)
        roots["shared_down"] = _down_root(shared, shared_plan.down, False)
        constants |= _shared_constants(shared) | {
            "SHARED_PROGRAMS": shared_plan.programs,
            "SHARED_DTYPE": _torch(layer.out),
            **_descriptors("SHARED_", shared, shared_plan.up, shared_plan.down),
        }
    return module_text(doc, source("host", "grouped_layer"), constants, roots)


def _decode(layer: Layer, tokens: int, gpu: Gpu, plan: Decode, doc: str) -> str:
    experts, shared = routed_experts(layer), shared_experts(layer)
    ffn, first = layer.ffn, layer.ffn.products
    known: dict[str, object] = {
        "K": layer.top_k,
        "E": layer.experts.count,
        "F": ffn.width,
        "SHARED": shared is not None,
        "SHARED_F": shared.ffn.width if shared else 0,
    }
    up = known | {
        "D": ffn.hidden,
        "GATE": first[0].first,
        "UP": first[-1].first,
        "STEP": first[0].step,
        "OUT": experts.out,
        "EXPERT_STRIDE": experts.up.strides[0],
        "ROW_STRIDE": experts.up.rows,
        "COLUMNS": plan.up.columns,
        "DEPTH": plan.up.depth,
        "SPLIT": plan.up.split,
        "GATED": experts.gated,
        "TRANSPOSED": first[0].transposed,
        "WEIGHED_INPUT": ffn.factor is not None,
        "WEIGHED": ffn.middle.weighs,
    }
    down = known | {
        "D": experts.width_out,
        "EXPERT_STRIDE": experts.down.strides[0],
        "ROW_STRIDE": experts.down.rows,
        "COLUMNS": plan.down.columns,
        "DEPTH": plan.down.depth,
        "TRANSPOSED": ffn.down.transposed,
        "WEIGHED": ffn.last.weighs,
        "WEIGHTED_SUM": ffn.is_weighted,
        "ADDED": layer.added,
    }
    up_functions, down_functions = experts.before_down(), {"finish": experts.finish()}
    up_vectors = {"vectors": experts.vectors(ffn.middle)}
    down_vectors = {"vectors": experts.vectors(ffn.last)}
    if shared:
        theirs = shared.ffn.products
        up |= {
            "SHARED_GATE": theirs[0].first,
            "SHARED_UP": theirs[-1].first,
            "SHARED_STEP": theirs[0].step,
            "SHARED_OUT": shared.out,
            "SHARED_ROW_STRIDE": shared.up.rows,
            "SHARED_GATED": shared.gated,
            "SHARED_TRANSPOSED": theirs[0].transposed,
        }
        down |= {"SHARED_ROW_STRIDE": shared.down.rows, "SHARED_TRANSPOSED": shared.ffn.down.transposed}
        up_functions["activate_shared"] = shared.activate()
        down_functions["finish_shared"] = shared.finish()
        up_vectors["shared_vectors"] = shared.vectors(shared.ffn.middle)
        down_vectors["shared_vectors"] = shared.vectors(shared.ffn.last)
    routing = _route_tiles(layer, tokens, gpu) if layer.router else None
    roots = {"route": _route_root(layer, routing)} if routing else {}
    roots["decode_up"] = Root("decode", "decode_up", up, _options(plan.up), up_functions, up_vectors)
    roots["decode_down"] = Root(
        "decode", "decode_down", down, _options(plan.down), down_functions, down_vectors
    )
    widest = max(ffn.width, shared.ffn.width if shared else 0)
    constants = _host_constants(layer, experts, routing) | {
        "UP_BLOCKS": -(-widest // plan.up.columns),
        "UP_COLUMNS": plan.up.columns,
        "DOWN_COLUMNS": plan.down.columns,
        "SPLIT": plan.up.split,
        "SHARED": shared is not None,
        **(_shared_constants(shared) if shared else {}),
    }
    return module_text(doc, source("host", "decode_layer"), constants, roots)


def _up_root(experts: BoundFfn, tiles: GemmTiles, top_k: int, is_sorted: bool) -> Root:
    ffn, first = experts.ffn, experts.ffn.products
    constants = {
        "K": top_k,
        "D": ffn.hidden,
        "F": ffn.width,
        "OUT": experts.out,
        "GATE": first[0].first,
        "UP": first[-1].first,
        "EXPERT_STRIDE": experts.up.strides[0],
        "ROW_STRIDE": experts.up.rows,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "GROUP": GROUP,
        "SORTED": is_sorted,
        "GATED": experts.gated,
        "INTERLEAVED": experts.interleaved,
        "GATE_FIRST": first[0].first == 0,
        "TRANSPOSED": first[0].transposed,
        "TMA": tiles.tma,
        "SWAP": tiles.swap,
        "EVEN": ffn.hidden % tiles.depth == 0,
        "HALVES": bool(ffn.middle.vectors) and tiles.rows * tiles.columns >= 128 * 128 and not tiles.swap,
        "WEIGHED_INPUT": ffn.factor is not None,
        "WEIGHED": ffn.middle.weighs,
    }
    functions = experts.before_down()
    return Root(
        "grouped_ffn",
        "grouped_up",
        constants,
        _options(tiles),
        functions,
        {"vectors": experts.vectors(ffn.middle)},
    )


def _down_root(experts: BoundFfn, tiles: GemmTiles, is_sorted: bool) -> Root:
    ffn = experts.ffn
    constants = {
        "D": experts.width_out,
        "F": ffn.width,
        "EXPERT_STRIDE": experts.down.strides[0],
        "ROW_STRIDE": experts.down.rows,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "GROUP": GROUP,
        "SORTED": is_sorted,
        "TRANSPOSED": ffn.down.transposed,
        "TMA": tiles.tma,
        "SWAP": tiles.swap,
        "EVEN": ffn.width % tiles.depth == 0,
        "HALVES": tiles.columns >= 256 and not tiles.swap,
        "BY_COLUMN": bool(ffn.last.vectors),
        "WEIGHED": ffn.last.weighs,
    }
    functions = {"finish": experts.finish()}
    return Root(
        "grouped_ffn",
        "grouped_down",
        constants,
        _options(tiles),
        functions,
        {"vectors": experts.vectors(ffn.last)},
    )


def _descriptors(prefix: str, experts: BoundFfn, up: GemmTiles, down: GemmTiles) -> dict[str, object]:
    """Which tensors the host function makes descriptors of, and their blocks."""
    columns = up.columns * (2 if experts.interleaved else 1)
    return {
        f"{prefix}UP_TMA": up.tma,
        f"{prefix}UP_BLOCK": _block(experts.ffn.products[0].transposed, columns, up.depth),
        f"{prefix}DOWN_TMA": down.tma,
        f"{prefix}DOWN_BLOCK": _block(experts.ffn.down.transposed, down.columns, down.depth),
        f"{prefix}H_BLOCK": [down.rows, down.depth],
    }


def _block(transposed: bool, columns: int, depth: int) -> list[int]:
    return [1, depth, columns] if transposed else [1, columns, depth]


def _host_constants(layer: Layer, experts: BoundFfn, routing: RouteTiles | None) -> dict[str, object]:
    ffn = experts.ffn
    routed: dict[str, object] = {}
    if routing and layer.router:
        routed = {
            "ROUTE_TOKENS": routing.tokens,
            "ROUTE_PARTS": routing.grid(1, layer.experts.count)[1],
            "ROUTE_SPLIT": routing.split,
            "WEIGHT_DTYPE": _torch(weights_dtype(layer.router, layer.x)),
        }
    return routed | {
        "ROUTED": layer.router is not None,
        "E": layer.experts.count,
        "K": layer.top_k,
        "F": ffn.width,
        "WIDTH": experts.width_out,
        "GATED": experts.gated and not experts.interleaved,
        "GATE_PARAM": ffn.products[0].param,
        "UP_PARAM": ffn.products[-1].param,
        "DOWN_PARAM": ffn.down.param,
        "H_DTYPE": _torch(experts.down.dtype),
        "Y_DTYPE": _torch(layer.row),
        "OUT_DTYPE": _torch(layer.out),
    }


def _shared_constants(shared: BoundFfn) -> dict[str, object]:
    return {
        "SHARED_F": shared.ffn.width,
        "SHARED_H_DTYPE": _torch(shared.down.dtype),
        "SHARED_GATED": shared.gated and not shared.interleaved,
        "SHARED_GATE_PARAM": shared.ffn.products[0].param,
        "SHARED_UP_PARAM": shared.ffn.products[-1].param,
        "SHARED_DOWN_PARAM": shared.ffn.down.param,
    }


def _options(tiles: GemmTiles | GemvTiles) -> dict[str, int]:
    limit = {"maxnreg": tiles.registers} if isinstance(tiles, GemmTiles) and tiles.registers else {}
    return {"num_warps": tiles.warps, "num_stages": tiles.stages, **limit}


def _torch(dtype: str) -> Code:
    return Code(f"torch.{dtype}")


def _power(size: int) -> int:
    """The power of two ≥ size."""
    return 1 << (size - 1).bit_length()


def _route_root(layer: Layer, tiles: RouteTiles) -> Root:
    constants = {k: _triton(v) for k, v in (layer.route_constants | tiles.constants()).items()}
    return Root("route", "route", constants, {"num_warps": tiles.warps})


def _route_tiles(layer: Layer, tokens: int, gpu: Gpu) -> RouteTiles:
    weight = layer.router_params[0].dtype
    return route_tiles(
        tokens,
        experts=layer.experts.count,
        columns=int(str(layer.route_constants["COLUMNS"])),
        operand_bytes=max(SIZES[layer.x], SIZES[weight]),
        processors=gpu.processors,
        shared=gpu.architecture.block_shared,
        barrier_orders_stores=gpu.architecture.barrier_orders_stores,
    )


def _triton(value: object) -> object:
    """A constant as the kernels' text spells it: dtypes are Triton's."""
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    return Code(f"tl.{names[str(value)]}") if str(value) in names else value
