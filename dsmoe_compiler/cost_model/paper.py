"""The tables of the DeepSeekMoE paper (arXiv 2401.06066), and the sizes that DeepSeek-V2 and V3 are published
with: what is printed, of which model of the zoo, and how near a built model has to come.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

Quantity: TypeAlias = Literal[
    "parameters", "activated", "expert parameters", "activated expert parameters", "training FLOPs"
]
# Figures of one digit or two round away more than those of three and four.
_TWO_DIGITS, _THREE_DIGITS, _FLOPS_TWO_DIGITS, _FLOPS = 0.06, 0.01, 0.018, 0.005
_EXPERTS = 0.025  # half a unit of the last digit of 0.24 and 2.3
_V2_V3 = 0.03  # "2.4B" and "21B" are rounded down


@dataclass(frozen=True)
class Figure:
    """A number as it is printed, without its unit; how far off, relative to it, still counts as equal; why it
    is not compared, if it is not.
    """

    quantity: Quantity
    printed: str
    tolerance: float
    skipped: str = ""

    @property
    def unit(self) -> Literal["B", "T"]:
        """Of the print: billions of parameters, or 10¹² FLOPs."""
        return "T" if self.quantity == "training FLOPs" else "B"

    @property
    def scale(self) -> float:
        """What the unit stands for."""
        return {"B": 1e9, "T": 1e12}[self.unit]

    @property
    def value(self) -> float:
        """The number meant."""
        return float(self.printed) * self.scale


@dataclass(frozen=True)
class PaperRow:
    """A model of a table. `preset` names it in the zoo; `tokens` of the sequence that FLOPs are of; `part` of
    a standard feed-forward of 8d² weights that one expert is in the paper's FLOPs, None: as wide as it was
    built; `lookup_activated`: whether the input embedding counts as activated.
    """

    name: str
    preset: str
    source: str
    figures: tuple[Figure, ...]
    tokens: int = 2048
    part: Fraction | None = None
    lookup_activated: bool = True
    note: str = ""


@dataclass(frozen=True)
class Unpublished:
    """A model whose sizes the paper does not give, and what it prints of it."""

    name: str
    source: str
    printed: str
    why: str


@dataclass(frozen=True)
class Ratio:
    """A percentage of FLOPs the paper states: of which row, relative to which other."""

    row: str
    against: str
    printed: float
    tolerance: float = 0.1  # of a percent, absolute


def _sizes(total: str, activated: str, tolerance: float) -> tuple[Figure, ...]:
    return (Figure("parameters", total, tolerance), Figure("activated", activated, tolerance))


def _experts(total: str, activated: str) -> tuple[Figure, ...]:
    return (
        Figure("expert parameters", total, _EXPERTS),
        Figure("activated expert parameters", activated, _EXPERTS),
    )


def _flops(tera: str, tolerance: float) -> tuple[Figure, ...]:
    return (Figure("training FLOPs", tera, tolerance),)


_ONE, _QUARTER = Fraction(1), Fraction(1, 4)
_NOT_REPRODUCIBLE = "what gives the 145B its 22.2B gives this 13.6B, and the 374.6T beside it imply 13.2B"
_WIDTH_1408 = "its FLOPs are those of experts as they are built, 1408 wide"
ROWS: tuple[PaperRow, ...] = (
    PaperRow(
        "Dense 0.2B",
        "dense-0.2b",
        "Table 1",
        _sizes("0.2", "0.2", _TWO_DIGITS) + _flops("2.9", _FLOPS_TWO_DIGITS),
        part=_ONE,
    ),
    PaperRow(
        "Hash Layer 2B",
        "hash-layer-2b",
        "Table 1",
        _sizes("2.0", "0.2", _TWO_DIGITS) + _flops("2.9", _FLOPS_TWO_DIGITS),
        part=_ONE,
    ),
    PaperRow(
        "Switch 2B",
        "switch-2b",
        "Table 1",
        _sizes("2.0", "0.2", _TWO_DIGITS) + _flops("2.9", _FLOPS_TWO_DIGITS),
        part=_ONE,
    ),
    PaperRow(
        "GShard 2B",
        "gshard-2b",
        "Table 1",
        _sizes("2.0", "0.3", _TWO_DIGITS) + _flops("4.3", _FLOPS_TWO_DIGITS),
        part=_ONE,
    ),
    PaperRow(
        "DeepSeekMoE 2B",
        "deepseek-moe-2b",
        "Tables 1, 2 and 7",
        _sizes("2.0", "0.3", _TWO_DIGITS) + _experts("1.89", "0.24") + _flops("4.3", _FLOPS_TWO_DIGITS),
        part=_QUARTER,
    ),
    PaperRow("GShard ×1.2", "gshard-x1.2", "Table 8", _experts("2.3", "0.28"), part=Fraction(6, 5)),
    PaperRow(
        "GShard ×1.5",
        "gshard-x1.5",
        "Tables 2 and 8",
        _experts("2.83", "0.35") + _flops("5.8", _FLOPS_TWO_DIGITS),
        part=Fraction(3, 2),
    ),
    PaperRow("Dense ×4", "dense-x4", "Table 9", _experts("0.47", "0.47"), part=Fraction(4)),
    PaperRow(
        "Dense ×16",
        "dense-x16",
        "Tables 2 and 9",
        _experts("1.89", "1.89") + _flops("24.6", _FLOPS),
        part=Fraction(16),
    ),
    PaperRow(
        "DeepSeekMoE 16B",
        "deepseek-moe-16b",
        "Tables 3, 4 and 7",
        _sizes("16.4", "2.8", _THREE_DIGITS) + _flops("74.4", _FLOPS),
        tokens=4096,
        part=_QUARTER,
        note="its FLOPs are those of quarters of a feed-forward, 1365.33 wide; it is built with 1408",
    ),
    PaperRow(
        "DeepSeek 7B",
        "deepseek-7b",
        "Table 3",
        _sizes("6.9", "6.9", _THREE_DIGITS) + _flops("183.5", _FLOPS),
        tokens=4096,
        part=_ONE,
    ),
    PaperRow(
        "LLaMA2 7B",
        "llama2-7b",
        "Table 4",
        _sizes("6.7", "6.7", _THREE_DIGITS) + _flops("187.9", _FLOPS),
        tokens=4096,
        part=_ONE,
    ),
    PaperRow(
        "DeepSeek 67B",
        "deepseek-67b",
        "Table 6",
        _sizes("67.4", "67.4", _THREE_DIGITS) + _flops("2057.5", _FLOPS),
        tokens=4096,
        part=_ONE,
        note="its keys and values, an eighth as wide as its queries, count as wide",
    ),
    PaperRow(
        "GShard 137B",
        "gshard-137b",
        "Table 6",
        _sizes("136.5", "21.6", _THREE_DIGITS) + _flops("572.7", _FLOPS),
        tokens=4096,
        part=_ONE,
    ),
    PaperRow(
        "DeepSeekMoE 145B",
        "deepseek-moe-145b",
        "Tables 6 and 7",
        _sizes("144.6", "22.2", _THREE_DIGITS) + _flops("585.6", _FLOPS),
        tokens=4096,
        note=_WIDTH_1408,
    ),
    PaperRow(
        "DeepSeekMoE 142B half",
        "deepseek-moe-142b-half",
        "Table 6",
        (
            Figure("parameters", "142.3", _THREE_DIGITS),
            Figure("activated", "12.2", _THREE_DIGITS, _NOT_REPRODUCIBLE),
        )
        + _flops("374.6", _FLOPS),
        tokens=4096,
        note=_WIDTH_1408,
    ),
    PaperRow(
        "DeepSeek-V2-Lite",
        "deepseek-v2-lite",
        "arXiv 2405.04434",
        _sizes("15.7", "2.4", _V2_V3),
        lookup_activated=False,
    ),
    PaperRow(
        "DeepSeek-V2",
        "deepseek-v2",
        "arXiv 2405.04434",
        _sizes("236", "21", _V2_V3),
        lookup_activated=False,
    ),
    PaperRow(
        "DeepSeek-V3",
        "deepseek-v3",
        "arXiv 2412.19437",
        _sizes("671", "37", _V2_V3),
        lookup_activated=False,
        note="without the module that predicts a second token",
    ),
)
UNPUBLISHED: tuple[Unpublished, ...] = (
    Unpublished(
        "DeepSeekMoE 13.3B",
        "Table 10",
        "13.3B parameters, 2.05B activated",
        "the paper gives neither its layers nor its width, so there is nothing to build",
    ),
)
RATIOS: tuple[Ratio, ...] = (
    Ratio("DeepSeekMoE 16B", "DeepSeek 7B", 40.5),
    Ratio("DeepSeekMoE 16B", "LLaMA2 7B", 39.6),
    Ratio("DeepSeekMoE 145B", "DeepSeek 67B", 28.5),
    Ratio("DeepSeekMoE 142B half", "DeepSeek 67B", 18.2),
)
