"""Obligations that cannot be missed: without them the answers are the same, for the reason given."""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "product.py",
        "grouped",
        "Unproven(f'{offsets.experts} experts are counted, the weights hold {shape(parameter)[0]}')",
    ): "torch captures no grouped product whose offsets are not as many as its matrices",
    ("one_expert.py", "_at_column", "require_distinct(domain.ids)"): (
        "a column is made of ids that were proven to differ, by the rules that add or scatter its numbers"
    ),
    (
        "fuse_router.py",
        "_fused",
        '_Unknown("a token\'s experts come from more than one top-k", node)',
    ): "ids are read through what keeps their last dimension, so they are as many as the one top-k takes",
    ("dense.py", "sum_one_hot", "require_distinct(found.ids)"): (
        "who reads the one-hots of a token as a mask of ones asks for it again, or adds them"
    ),
    ("masks.py", "any_slot", "require_distinct(found.ids)"): "rows that such a mask lists ask for it again",
}

# Second nets: no layer is known that reaches them. One that does needs a test that misses them.
UNREACHED: dict[tuple[str, str, str], str] = {
    (
        "state.py",
        "share",
        "self.require_unwritten(node)",
    ): "what all experts share was asked for as each one's own",
    ("dispatch.py", "_scores", "lift.require_unwritten(below)"): "scores are asked for when they are weights",
    (
        "capacity.py",
        "_require_apart",
        "Unproven('pairs sit at places that were counted for other pairs')",
    ): "a place's rule keeps the pairs it was counted for",
    (
        "insert.py",
        "_sizes_like",
        "Unproven(f'more than one size of %{node.name} is held by no value of the graph')",
    ): "sizes of a sum are those of its inputs",
    (
        "fuse_router.py",
        "_ungroup",
        '_Unknown("the mask over groups does not cover each group\'s experts", mask)',
    ): "a mask that is widened otherwise is no complement of the groups kept",
}
