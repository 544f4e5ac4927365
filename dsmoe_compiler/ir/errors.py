"""What can go wrong, in two kinds: a `Refusal` is an answer, an exception is the user's input or our bug."""

from __future__ import annotations

from dataclasses import dataclass

# Every code a refusal may carry: R2xx router, R3xx experts, R4xx permutation and combine, R5xx target; R1xx,
# capture, are those of a CaptureError.
CODES: dict[str, str] = {
    "R101": "the code depends on the values of tensors in a way that cannot be traced",
    "R102": "what tracing took for granted of the code does not hold on other routings",
    "R103": "the captured graph gives other numbers than the model",
    "R104": "the code does something else that torch.export does not trace",
    "R105": "the model returns something that is not made of tensors and numbers",
    "R201": "the router's weights or ids do not come from top-k scores of known form",
    "R202": "the router reads another tensor than its experts",
    "R203": "validation: the fused router gives other numbers than the one it replaces",
    "R204": "the router's top-k does not take the best of all the layer's experts",
    "R301": "the experts' computation leaves the known term language",
    "R302": "the layer's weights are not all indexed by the same experts",
    "R303": "the experts of one layer read different inputs",
    "R304": "validation: the fused experts give other numbers than the ones they replace",
    "R305": "the layer's weights hold NaN",
    "R306": "validation: the fused shared experts give other numbers than the ones they replace",
    "R307": "the experts that are visited are not all there are, each once",
    "R308": "the experts do not compute the same, each with tensors of its own",
    "R309": "more than one routing weight meets a pair's row",
    "R401": "the permutation, the counts or the offsets do not come from a sort of the same ids",
    "R402": "the rows are not brought back to the tokens' own order before they are combined",
    "R403": "tokens are gathered with another divisor than the number of ids per token",
    "R404": "the ids within one token are not known to be distinct",
    "R405": "a dense weight matrix is not zero away from the selected experts",
    "R406": "the dense experts do not vanish where their weight is zero",
    "R407": "no combine was found: the experts' rows never become tokens again",
    "R408": "a tensor the layer reads is overwritten in place where another name still reads it",
    "R409": "the places in the experts' capacity are not known to hold each pair once, dispatched as "
    "combined",
    "R410": "an operator on the ids, or on a permutation, mask, count or weight made of them, is not known",
    "R501": "validation: the whole program gives other numbers than the model",
}

# What to write instead, by code.
_A_DEFECT = (
    "nothing here: the layer runs as written; a rewrite that changes the answer is a defect of this "
    "compiler, worth a report"
)
REMEDIES: dict[str, str] = {
    "R101": "say with where, clamp or a mask what the branch or the loop says",
    "R102": "let an expert without tokens change nothing, and do the same however many tokens one has",
    "R103": "let the code do the same traced as run: no branch on what kind of tensor it is given, on sizes, "
    "or on earlier calls",
    "R104": "make an operator of the part that fails (torch.library.custom_op), or give another example",
    "R105": "return tensors and numbers, or tuples, lists, dicts, named tuples and dataclasses of them",
    "R201": "the experts are fused all the same; to fuse the router too, score by softmax or sigmoid, "
    "select by one top-k over all experts, and weigh by the selected scores",
    "R202": "the experts are fused all the same; to fuse the router too, let it read what its experts read",
    "R203": _A_DEFECT,
    "R204": "the experts are fused all the same; to fuse the router too, let one top-k take the largest "
    "along the last dimension, over as many scores as there are experts",
    "R301": "let an expert's rows pass only what works on each row alone: linear maps by its expert's "
    "tensors, pointwise operators, slices and concatenations of the width, the mean over the width",
    "R302": "let the rows of an expert meet the tensors of that expert, of as many experts as there are",
    "R303": "let all experts read one value, a row for each token whose ids are used",
    "R304": _A_DEFECT,
    "R305": "repair the weights: a rewrite can be checked only where they hold numbers",
    "R306": _A_DEFECT,
    "R307": "visit every expert that ids can choose, once, and add its rows to the one sum, slot by slot "
    "or all slots at once",
    "R308": "give every expert the same operators and tensors of the same shapes, reading the same values",
    "R309": "make one weight of the routing weights before it meets the experts' rows: w = w1 * w2",
    "R401": "take permutation, counts and offsets from one sort of one set of ids, in ascending order: "
    "bincount or histc of the ids, cumulated",
    "R402": "bring the rows back by the inverse of the permutation that sorted them, or add each at its "
    "own token",
    "R403": "take a pair's token as perm // K, K being the number of ids a token",
    "R404": "take a token's ids from one top-k, which are distinct",
    "R405": "scatter the weights onto zeros: zeros(T, E).scatter(1, ids, w)",
    "R406": "weigh what the experts give, after biases and whatever else is not 0 where the weight is",
    "R407": "let the rows become tokens again: a sum over the slots, or index_add onto zeros at the rows' "
    "tokens",
    "R408": "write into a fresh tensor (y = y + z, not y += z), or clone what is read again",
    "R409": "count places with one cumsum over all pairs that share an expert, drop a pair from the "
    "dispatch and from the combine alike",
    "R410": "bring ids to their use by one of the known ways: a sort, a comparison with an expert's "
    "number, one_hot, an index of the experts' tensors, a scatter of the weights",
    "R501": _A_DEFECT,
}


@dataclass(frozen=True)
class Refusal:
    """Why a layer, a router or a shared expert was left as it was.

    `code` is a key of `CODES`, `because` one sentence, `node` the graph value at which understanding ended,
    `source` the user's "file.py:123", or "" when the graph does not say, `text` that line.
    """

    code: str
    because: str
    node: str = ""
    source: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown refusal code {self.code!r}; ir/errors.py lists them")

    @property
    def meaning(self) -> str:
        """What the code says of any layer."""
        return CODES[self.code]

    def __str__(self) -> str:
        where = " ".join(part for part in (f"at %{self.node}" if self.node else "", self.source) if part)
        return f"{self.code}: {self.because}" + (f" ({where})" if where else "")


class DsmoeError(Exception):
    """The root of all our exceptions; the message is one line of what, where and what to do."""


class InputError(DsmoeError):
    """The user's input is wrong: a name, an argument, a file, a path."""


class CaptureError(DsmoeError):
    """The model could not be turned into a graph that computes the same; `code` is one of R1xx."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code

    def __str__(self) -> str:
        message = super().__str__()
        return f"{self.code}: {message}" if self.code else message


class ShapeError(InputError):
    """A tensor's shape or dtype lies outside what was captured."""


class LoadError(InputError):
    """A file is not a program saved by this package, or is damaged."""


class ExportError(DsmoeError):
    """A program cannot be written in another format, or what was written gives other numbers."""


class NotFused(DsmoeError):
    """`require_fused=True` and at least one Mixture-of-Experts layer was refused."""

    def __init__(self, refusals: tuple[tuple[str, Refusal], ...]) -> None:
        self.refusals = refusals
        listing = "; ".join(f"{name or '(model)'}: {refusal}" for name, refusal in refusals)
        super().__init__(f"{len(refusals)} layer(s) not fused: {listing}")
