"""The Triton kernel of vLLM or SGLang, out of a file of theirs, on our inputs.

Both serve MoE layers with a kernel named `fused_moe_kernel`, launched twice. Only its text is taken from the
file, so that neither has to be installed. What is around it there (sorting and padding the ids, one launch or
more) is done beforehand here and not timed: their figure is a lower bound of what they take. SiLU and product
are one launch, as there, and the sum over slots is torch's. Its tiles are the fastest of a few.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu_inputs import Inputs
from dsmoe_compiler.codegen.load import load

KERNEL = "fused_moe_kernel"
_INSTALLED = {
    "vllm": "model_executor/layers/fused_moe/fused_moe.py",
    "sglang": "srt/layers/moe/fused_moe_triton/fused_moe_triton_kernels.py",
}
_HEADER = "import torch\nimport triton\nimport triton.language as tl\n"
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Tiles:
    """What their kernel is launched with; `descriptor`: the weights by TMA, where it has that."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int
    descriptor: bool = False


# Their defaults for few tokens and for many, and what their tuned tables hold for like shapes.
FEW = (Tiles(16, 64, 128, 1, 4, 4), Tiles(16, 32, 64, 1, 4, 3), Tiles(16, 128, 64, 1, 4, 4))
MIDDLE = (Tiles(64, 64, 32, 8, 4, 3), Tiles(16, 128, 64, 1, 4, 4), Tiles(32, 64, 128, 1, 4, 3))
MANY = (Tiles(64, 64, 32, 8, 4, 3), Tiles(128, 128, 64, 8, 8, 3), Tiles(128, 256, 64, 16, 8, 4))


def tiles_for(pairs: int, experts: int) -> tuple[Tiles, ...]:
    """Those worth trying for so many rows an expert."""
    rows = pairs / experts
    return FEW if rows <= 4 else MIDDLE if rows <= 32 else MANY


def installed(package: str) -> Path | None:
    """The file with the kernel of "vllm" or "sglang", where that is installed."""
    spec = find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (file := Path(folder) / _INSTALLED[package]).is_file():
            return file
    return None


def kernel_of(file: Path) -> Any:
    """Their kernel, with the functions of the file that it calls. Raises ValueError where it is not there."""
    tree = ast.parse(file.read_text())
    functions = {
        node.name: node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    }
    if KERNEL not in functions:
        raise ValueError(f"{file} has no Triton kernel named {KERNEL}")
    needed, left = set[str](), [KERNEL]
    while left:
        name = left.pop()
        if name not in needed:
            needed.add(name)
            named = {n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name)}
            left += sorted(named & functions.keys())
    constants = [n for n in tree.body if isinstance(n, ast.Assign) and "constexpr" in ast.unparse(n.value)]
    parts = [*constants, *(functions[n] for n in functions if n in needed)]
    module: ModuleType = load(_HEADER + "\n\n".join(ast.unparse(part) for part in parts) + "\n")
    return getattr(module, KERNEL)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def silu_and_mul(both, out, F: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out (P, F) = silu(both[:, :F]) · both[:, F:]. Grid: (P, cdiv(F, BLOCK))."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(both + row * 2 * F + column, mask=column < F).to(tl.float32)
    up = tl.load(both + row * 2 * F + F + column, mask=column < F).to(tl.float32)
    tl.store(out + row * F + column, gate * tl.sigmoid(gate) * up, mask=column < F)


@dataclass(frozen=True)
class Aligned:
    """Pairs in the order of their experts, each expert's padded to whole tiles: `pairs` (padded,), the number
    of all pairs where there is none; the expert of every tile; how many places are filled (1,).
    """

    pairs: Tensor
    experts: Tensor
    filled: Tensor


def aligned(ids: Tensor, experts: int, rows: int) -> Aligned:
    """What their kernel reads, for tiles of so many rows."""
    flat = ids.flatten().long()
    count = flat.numel()
    by_expert, order = flat.sort(stable=True)
    found = torch.zeros(experts, dtype=torch.long, device=ids.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    padded = (found + rows - 1) // rows * rows
    ends = padded.cumsum(0)
    place = (ends - padded - (found.cumsum(0) - found))[by_expert] + torch.arange(count, device=ids.device)
    # Fewer than a tile of padding for each expert that has pairs at all.
    longest = count + min(count, experts) * (rows - 1)
    longest = (longest + rows - 1) // rows * rows
    pairs = torch.full((longest,), count, dtype=torch.int32, device=ids.device)
    pairs[place] = order.int()
    first = torch.arange(0, longest, rows, device=ids.device)
    tile_experts = torch.searchsorted(ends, first, right=True).clamp(max=experts - 1).int()
    return Aligned(pairs, tile_experts, ends[-1:].int())


class ForeignExperts:
    """Routed experts by their kernel. Raises ValueError for a version with parameters that are not known
    here.
    """

    def __init__(self, kernel: Any, tiles: Tiles) -> None:
        self.kernel, self.tiles = kernel, tiles
        self.aligned: dict[int, Aligned] = {}
        self.float_weights: dict[int, Tensor] = {}

    def prepare(self, sets: Sequence[Inputs]) -> None:
        """What is not timed."""
        for i in sets:
            self.aligned[id(i)] = aligned(i.ids, i.layer.down.shape[0], self.tiles.rows)
            self.float_weights[id(i)] = i.weights.float()

    def __call__(self, i: Inputs) -> Tensor:
        """out (T, D)."""
        tokens, top_k = i.ids.shape
        _, hidden, width = i.layer.down.shape
        both = i.x.new_empty(tokens * top_k, 2 * width)
        h = i.x.new_empty(tokens * top_k, width)
        y = i.x.new_empty(tokens * top_k, hidden)
        self._multiply(i, i.x, i.layer.gate_up, both, top_k, weighed=False)
        block = min(1024, triton.next_power_of_2(width))
        silu_and_mul[(tokens * top_k, triton.cdiv(width, block))](both, h, F=width, BLOCK=block)
        self._multiply(i, h, i.layer.down, y, 1, weighed=True)
        return y.view(tokens, top_k, hidden).sum(1)

    def _multiply(self, i: Inputs, a: Tensor, b: Tensor, c: Tensor, top_k: int, weighed: bool) -> None:
        tiles, rows = self.tiles, self.aligned[id(i)]
        _, n, k = b.shape
        places = rows.pairs.numel()
        values: dict[str, object] = {
            "a_ptr": a,
            "b_ptr": b,
            "c_ptr": c,
            "topk_weights_ptr": self.float_weights[id(i)],
            "sorted_token_ids_ptr": rows.pairs,
            "expert_ids_ptr": rows.experts,
            "num_tokens_post_padded_ptr": rows.filled,
            "N": n,
            "K": k,
            "EM": places,
            "num_valid_tokens": i.ids.numel(),
            "stride_am": a.stride(0),
            "stride_ak": 1,
            "stride_be": b.stride(0),
            "stride_bk": 1,
            "stride_bn": b.stride(1),
            "stride_cm": c.stride(0),
            "stride_cn": 1,
            "group_n": 0,
            "group_k": 0,
            "BLOCK_SIZE_M": tiles.rows,
            "BLOCK_SIZE_N": tiles.columns,
            "BLOCK_SIZE_K": tiles.depth,
            "GROUP_SIZE_M": tiles.group,
            "SPLIT_K": 1,
            "MUL_ROUTED_WEIGHT": weighed,
            "top_k": top_k,
            "compute_type": _DTYPES[a.dtype],
            "even_Ks": k % tiles.depth == 0,
            "ROUTER_TOPK": i.ids.shape[1],
            **_quantised(self.kernel.arg_names),
        }
        if tiles.descriptor:
            from triton.tools.tensor_descriptor import TensorDescriptor

            values["b_desc"] = TensorDescriptor.from_tensor(b, [1, tiles.columns, tiles.depth])
        unknown = [name for name in self.kernel.arg_names if name not in values]
        if unknown:
            raise ValueError(f"their kernel takes {', '.join(unknown)}, which are not known here")
        grid = (triton.cdiv(places, tiles.rows) * triton.cdiv(n, tiles.columns),)
        given = {name: values[name] for name in self.kernel.arg_names}
        self.kernel[grid](**given, num_warps=tiles.warps, num_stages=tiles.stages)


# Off, whatever its name is in their version: quantised operands, biases, experts elsewhere, other outputs.
_OFF: Mapping[str, object] = {
    **dict.fromkeys(("a_scale_ptr", "b_scale_ptr", "b_bias_ptr", "bias_ptr", "a_desc", "b_desc")),
    **dict.fromkeys(("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "per_channel_quant"), False),
    **dict.fromkeys(("HAS_BIAS", "c_sorted", "filter_expert", "swap_ab", "FUSE_SUM_ALL_REDUCE"), False),
    **dict.fromkeys(("naive_block_assignment", "use_int4_w4a16", "has_zp"), False),
}


def _quantised(names: Sequence[str]) -> dict[str, object]:
    strides = [n for n in names if n.startswith(("stride_as", "stride_bs", "stride_bb", "stride_bias"))]
    return {**_OFF, **dict.fromkeys(strides, 0)}


def with_descriptors(kernel: Any, tiles: Sequence[Tiles]) -> list[Tiles]:
    """The same tiles by descriptors, too, where the kernel takes them."""
    if "b_desc" not in kernel.arg_names:
        return list(tiles)
    return [*tiles, *(replace(t, descriptor=True) for t in tiles)]
