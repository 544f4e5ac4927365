"""Why a layer was refused, and how far it was understood before; how a fused one was."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from dsmoe_compiler.ir.errors import REMEDIES, Refusal
from dsmoe_compiler.ir.explanation import Explanation, Moment
from dsmoe_compiler.ir.graph import (
    CASTS,
    COPIES,
    VIEWS,
    ancestors,
    aten,
    defining_file,
    is_tensor,
    module_path,
)
from dsmoe_compiler.ir.source_lines import last_calls, own_line
from dsmoe_compiler.passes.lift.describe import describe, of_weights_alone
from dsmoe_compiler.passes.lift.discover import Selection, selectors_of
from dsmoe_compiler.passes.lift.known_spellings import SEGMENTS, SORTED, nearest
from dsmoe_compiler.passes.lift.losses import Lost, ids_in
from dsmoe_compiler.passes.lift.remedies import remedy_of
from dsmoe_compiler.passes.lift.state import Lift, operator_name
from dsmoe_compiler.passes.lift.values import Rows

_MOVES = (
    VIEWS | CASTS | COPIES | {aten.unsqueeze.default, aten.squeeze.dim, aten.t.default, aten.expand.default}
)


@dataclass
class Explainer:
    """What a finished walk says of each layer. `order` is each node's place in the graph as it was walked."""

    lift: Lift
    order: Mapping[Node, int]
    _of_selector: dict[Node, list[Node]] = field(default_factory=dict)
    _selectors: dict[Node, tuple[Node, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node, found in self.lift.meaning.items():
            for selector in self._selected_by(ids_in(found)):
                self._of_selector.setdefault(selector, []).append(node)

    def fused(self, combine: Node, selector: Node | None) -> Explanation:
        """How a layer was understood, up to the value in which its rows are tokens again."""
        return Explanation(self._moments(selector, [combine], [self._moment("combined", combine)]))

    def unfinished(self, combine: Node, selector: Node | None, code: str, because: str) -> Explanation:
        """The same of a layer that was understood, and is nothing the op could be."""
        last = self.lift.meaning.get(combine)
        lost = Lost(None, combine, code, because, None if last is None else (combine, last))
        return self._of_loss(lost, selector, code)

    def refused(self, selection: Selection) -> tuple[Refusal, Explanation]:
        """Why nobody combined what a selection chose: the first loss on its own ids says so."""
        lost = self._loss(selection)
        if lost is None:
            use = self._first_reader(selection)
            because = f"the ids are first used by {use.target}, a spelling that is not known"
            end = [self._moment("lost", use)]
            moments = self._moments(selection.selector, [use], end)
            refusal = refusal_at("R407", because, use, selection.name)
            return refusal, Explanation(moments, (), REMEDIES["R410"])
        code, because = self._reason(lost)
        refusal = refusal_at(code, because, lost.node, selection.name)
        return refusal, self._of_loss(lost, selection.selector, code)

    def _of_loss(self, lost: Lost, selector: Node | None, code: str) -> Explanation:
        end = list[Moment]()
        if lost.last is not None:
            end.append(self._moment("last understood", lost.last[0]))
        end += [self._moment("beside it", a) for a in self._beside(lost)[:1]]
        end += self._named(lost)
        end.append(Moment("lost", operator_name(lost.node), lost.node.name, "", last_calls(lost.node)))
        starts = lost.node.all_input_nodes if lost.last is None else [lost.last[0]]
        sorts = (SORTED, SEGMENTS) if code == "R401" else ()  # the sort itself was recognised, and no more
        known = sorts if lost.last is None else nearest(lost.last[1])
        return Explanation(self._moments(selector, starts, end), known, remedy_of(self.lift, lost, code))

    def _named(self, lost: Lost) -> list[Moment]:
        """The values that the reason calls by their names."""
        names = dict.fromkeys(re.findall(r"%(\w+)", lost.because))
        nodes = {node.name: node for node in self.order if node.name in names}
        return [self._moment(f"%{name}", nodes[name]) for name in names if name in nodes]

    def _moments(
        self, selector: Node | None, starts: Iterable[Node], end: list[Moment]
    ) -> tuple[Moment, ...]:
        """From the choice of ids to `end`; a value that has two parts in this is told once."""
        found = list[Moment]()
        if selector is not None:
            found.append(self._moment("ids chosen", selector))
            uses = self._of_selector.get(selector, [])
            found += [self._moment("ids first used", min(uses, key=self._place))] if uses else []
        rows = [n for n in self._behind(starts) if self._reads_tokens(n)]
        found += [self._moment("rows begin", min(rows, key=self._place))] if rows else []
        last = {m.node for m in end}
        kept = [m for m in found if m.node not in last]
        return (*(m for i, m in enumerate(kept) if m.node not in {k.node for k in kept[:i]}), *end)

    def _moment(self, what: str, node: Node) -> Moment:
        found = self.lift.meaning.get(node)
        means = "" if found is None else describe(self.lift, found)
        return Moment(what, operator_name(node), node.name, means, last_calls(node))

    def _place(self, node: Node) -> int:
        return self.order.get(node, len(self.order))

    def _behind(self, starts: Iterable[Node]) -> set[Node]:
        """The values with a meaning that lead to these, themselves included."""
        stack, seen = list(starts), set[Node]()
        while stack:
            at = stack.pop()
            if at not in seen and at in self.lift.meaning:
                seen.add(at)
                stack.extend(at.all_input_nodes)
        return seen

    def _reads_tokens(self, node: Node) -> bool:
        rows = self.lift.rows(node)
        return rows is not None and bool(self.lift.terms.leaves(rows.term, "token"))

    # -- which loss speaks for a layer -----------------------------------------------------------------------

    def _loss(self, selection: Selection) -> Lost | None:
        """The first loss on the selection's ids, or on values without ids that lead there.

        Where all are silent, the first that leads to a use of the ids; statistics of the routing do not.
        """
        losses = self.lift.losses
        own = [x for x in losses if selection.selector in self._selected_by(x.ids)]
        told = [x for x in own if not x.silent]
        before = ancestors([selection.first_use, *(x.node for x in told)])
        told += [x for x in losses if not x.silent and x.ids is None and self._leads(x, before, selection)]
        if told:
            return self._before(min(told, key=lambda x: self._place(x.node)), own)
        to_uses = ancestors(selection.uses)
        silent = [x for x in own if x.node in to_uses]
        silent += [x for x in losses if x.silent and x.ids is None and self._leads(x, to_uses, selection)]
        return min(silent or own, key=lambda x: self._place(x.node), default=None)

    def _before(self, lost: Lost, own: list[Lost]) -> Lost:
        """Where rows met a value without meaning, the loss that took it away, if one did."""
        behind = ancestors(self._beside(lost))
        earlier = [x for x in own if x.silent and x.node in behind]
        return min(earlier, key=lambda x: self._place(x.node), default=lost)

    def _first_reader(self, selection: Selection) -> Node:
        """Of the operators through which ids come to their uses, the first that does more than move them."""
        to_uses, stack, readers = ancestors(selection.uses), [selection.selector], list[Node]()
        while stack:
            for user in stack.pop().users:
                if operator_name(user) == "getitem" and user.args[1] == 0:
                    continue  # what top-k found, not where
                moves = user.target in _MOVES or operator_name(user) == "getitem"
                (stack if moves else readers).append(user)
        readers = [n for n in readers if n in to_uses]
        return min(readers, key=self._place, default=selection.first_use)

    def _leads(self, lost: Lost, to: set[Node], selection: Selection) -> bool:
        return lost.node in to and _within(lost.node, selection.name)

    def _selected_by(self, ids: Node | None) -> tuple[Node, ...]:
        if ids is None:
            return ()
        if ids not in self._selectors:
            self._selectors[ids] = selectors_of(ids)
        return self._selectors[ids]

    def _reason(self, lost: Lost) -> tuple[str, str]:
        """(code, sentence); a loss without a reason is an operator that no rule knows."""
        operator = operator_name(lost.node)
        if lost.because:
            return lost.code, lost.because
        assert lost.last is not None
        if not isinstance(lost.last[1], Rows) or of_weights_alone(self.lift, lost.last[1]):
            because = f"{operator} is not known on routing values: {describe(self.lift, lost.last[1])}"
            return "R410", because
        rows = [r for a in lost.node.all_input_nodes if (r := self.lift.rows(a)) is not None]
        words = " and ".join(dict.fromkeys(r.domain.words for r in rows))
        if any(rows[0].domain.meet(r.domain) is None for r in rows[1:]):
            words += ", which are not the same rows"
        beside = " beside another value" if self._beside(lost) else ""
        return "R301", f"{operator} is not known on {words}{beside}"

    def _beside(self, lost: Lost) -> list[Node]:
        """Where rows met an operator that is not known, the other tensors there: no rows, no parameters."""
        if lost.because or lost.last is None or not isinstance(lost.last[1], Rows):
            return []
        of_model = self.lift.graph.parameter
        return [
            a
            for a in lost.node.all_input_nodes
            if is_tensor(a) and of_model(a) is None and self.lift.rows(a) is None
        ]


def refusal_at(code: str, because: str, node: Node, layer: str) -> Refusal:
    """A refusal with the user's own line behind a node of a layer."""
    line = own_line(node, defining_file(node, layer))
    where, text = ("", "") if line is None else (str(line), line.text)
    return Refusal(code, because, node.name, where, text)


def _within(node: Node, layer: str) -> bool:
    name = layer.split("#")[0]
    return not name or f"{'.'.join(module_path(node))}.".startswith(f"{name}.")
