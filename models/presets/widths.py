"""Hidden widths that a paper gives as parts of a standard feed-forward, as whole numbers.

A standard feed-forward has 8·D² weights: with SwiGLU's three matrices its hidden width is 8/3·D, seldom a
whole number. DeepSeekMoE's tables follow from two ways of rounding it: the 2B's from the nearest multiple of
8, which keeps rows aligned and gives 1.89 B expert parameters; the larger ones' from the next multiple of 64,
as in the released 16B, whose experts are 1408 wide and whose dense layer is 10944 wide.
"""

from fractions import Fraction


def nearest_width(hidden_size: int, parts: Fraction | int) -> int:
    """So many standard feed-forwards, the hidden width rounded to the nearest multiple of 8."""
    return 8 * round(Fraction(8, 3) * hidden_size * parts / 8)


def next_width(hidden_size: int, parts: Fraction | int) -> int:
    """So many standard feed-forwards, the hidden width rounded up to a multiple of 64."""
    return 64 * -(-(Fraction(8, 3) * hidden_size * parts) // 64)
