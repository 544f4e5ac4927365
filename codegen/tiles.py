"""What a plan is made of: the problem it is for, and the tiles of its kernels.

Letters: T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Problem:
    """All that the choice of kernels and tiles depends on, the GPU and Triton aside.

    `tokens` is the bucket, a power of two ≥ T; `hidden` D, `width` F, `experts` E, `top_k` K. `taps`:
    products with x a row (2 gated, 1 plain). `shared_width`: the hidden width of all shared experts together,
    0 without. `tma`: whether the operands' layout allows descriptors (16-byte rows and base). `interleaved`:
    gate and up lie in alternate columns and are one wide product. `up_transposed`, `down_transposed`:
    matrices lie (in, out), what is next in memory is another output's. `biased`: vectors are read beside the
    matrices.
    """

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    taps: int
    dtype: str
    shared_width: int = 0
    tma: bool = True
    interleaved: bool = False
    up_transposed: bool = False
    down_transposed: bool = False
    biased: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "width", "experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"Problem.{name} is a positive integer, got {getattr(self, name)!r}")
        if self.tokens & (self.tokens - 1):
            raise ValueError(f"Problem.tokens is a power of two, got {self.tokens}; see bucket()")
        if self.top_k > self.experts:
            raise ValueError(f"Problem selects {self.top_k} of {self.experts} experts")
        if self.taps not in (1, 2):
            raise ValueError(f"Problem.taps is 1 or 2, got {self.taps!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"Problem.dtype is one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.shared_width < 0:
            raise ValueError(f"Problem.shared_width is not negative, got {self.shared_width!r}")

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype]

    @property
    def pairs(self) -> int:
        """P = T·K."""
        return self.tokens * self.top_k

    @property
    def shared(self) -> Problem | None:
        """The shared experts as a problem of their own: one expert, which every token selects."""
        if not self.shared_width:
            return None
        return replace(self, width=self.shared_width, experts=1, top_k=1, shared_width=0)

    @property
    def text(self) -> str:
        """One canonical line: `tokens=64,hidden=2048,…`, fields at their default left out."""
        named = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return ",".join(f"{name}={value}" for name, value, default in named if value != default)


# Row tiles that take an expert's columns together, stripe by stripe, so that a stripe is read from memory
# once for all of them: an expert of 14336 columns outgrows L2 before its next tile begins.
GROUP = 8


@dataclass(frozen=True)
class GemmTiles:
    """Tiles of a grouped product: `rows` tokens, `columns` of one accumulator (gate and up have one each),
    `depth` of a step of the reduction. `swap`: the weights are the product's rows and the tokens its columns.
    `tma`: by tensor descriptors. `registers`: the most that a thread may take, 0 where the compiler decides.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    swap: bool = False
    tma: bool = False
    registers: int = 0


@dataclass(frozen=True)
class GemvTiles:
    """Tiles of a matrix-vector product; `split` programs share a reduction."""

    columns: int
    depth: int
    warps: int
    stages: int
    split: int = 1


@dataclass(frozen=True)
class Decode:
    """No sort: a matrix-vector product for each (token, expert) pair."""

    up: GemvTiles
    down: GemvTiles


@dataclass(frozen=True)
class Grouped:
    """Pairs sorted by expert, a tile table, two grouped products on a persistent grid of `programs`."""

    up: GemmTiles
    down: GemmTiles
    programs: int


Plan = Decode | Grouped
