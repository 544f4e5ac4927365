"""Questions every pass asks of a captured graph: shapes, parameters, module paths, source lines, aliases."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.utils._sympy.symbol import SymT, symbol_is_type

from dsmoe_compiler.ir.source_lines import stack_of

aten = torch.ops.aten
Size: TypeAlias = int | torch.SymInt

# Composite operators that may hand their input back, though their schema does not say so.
_MAY_ALIAS = frozenset(
    {
        "contiguous",
        "detach",
        "detach_",
        "expand_as",
        "flatten",
        "lift_fresh",
        "movedim",
        "narrow",
        "ravel",
        "reshape",
        "reshape_as",
        "to",
        "type_as",
        "view_as",
    }
)
# Operators that only rearrange or relabel: a value seen through them is the same value.
VIEWS = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
)
CASTS = frozenset(
    {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.type_as.default}
)
COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default})


@dataclass(frozen=True)
class ProgramGraph:
    """A captured program: its graph, and which placeholder stands for which tensor of the model."""

    exported: ExportedProgram

    @property
    def graph(self) -> Graph:
        graph: Graph = self.exported.graph_module.graph
        return graph

    @property
    def nodes(self) -> list[Node]:
        return list(self.graph.nodes)

    @cached_property
    def _names(self) -> dict[str, str]:
        signature = self.exported.graph_signature
        return {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }

    def parameter(self, node: object) -> str | None:
        """The dotted name of the parameter, buffer or constant a placeholder stands for, else None."""
        return self._names.get(node.name) if isinstance(node, Node) and node.op == "placeholder" else None

    def constant(self, node: Node) -> str | None:
        """The name of the constant that capture lifted out of the code, if a placeholder stands for one."""
        constants: Mapping[str, str] = self.exported.graph_signature.inputs_to_lifted_tensor_constants
        return constants.get(node.name)

    def tensor(self, node: Node) -> Tensor:
        """The model's own tensor behind a placeholder. Raises KeyError when it stands for a user input."""
        name = self._names[node.name]
        state = self.exported.state_dict
        found = state[name] if name in state else self.exported.constants[name]
        assert isinstance(found, Tensor)
        return found

    def on_meta(self) -> bool:
        """Whether any tensor of the program has no storage, so nothing can be run."""
        tensors = [*self.exported.state_dict.values(), *self.exported.constants.values()]
        return any(isinstance(t, Tensor) and t.is_meta for t in tensors)

    def user_inputs(self) -> Iterator[Node]:
        """The placeholders that are the caller's arguments."""
        return (n for n in self.graph.nodes if n.op == "placeholder" and n.name not in self._names)


def value(node: Node) -> Any:
    """What capture recorded as the node's value: a fake tensor, a symbolic size, a tuple."""
    return node.meta["val"]


def is_tensor(node: object) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def shape(node: Node) -> tuple[Size, ...]:
    """The node's shape; symbolic sizes stay symbolic, those that tracing pinned to a number are that
    number.
    """
    return sizes_of(value(node))


def sizes_of(tensor: Tensor) -> tuple[Size, ...]:
    """A recorded tensor's shape, as `shape` gives a node's."""
    return tuple(_plain(size) for size in tensor.shape)


def _plain(size: Size) -> Size:
    expression = size.node.expr if isinstance(size, torch.SymInt) else size
    return int(expression) if getattr(expression, "is_Integer", True) else size


def dtype(node: Node) -> torch.dtype:
    """The node's dtype."""
    return value(node).dtype  # type: ignore[no-any-return]


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are the same number or provably the same expression; never guards."""
    return str(_expression(a)) == str(_expression(b))


def same_sizes(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are as long as each other and of the same sizes throughout."""
    return len(a) == len(b) and all(map(same_size, a, b))


def same_shape(a: object, b: object) -> bool:
    """Whether both are tensors of one shape; an operand may be a number."""
    if not isinstance(a, Node) or not isinstance(b, Node) or not is_tensor(a) or not is_tensor(b):
        return False
    return same_sizes(shape(a), shape(b))


def depends_on_data(size: object) -> bool:
    """Whether a size was read from a tensor's values, rather than following from the inputs' sizes."""
    symbols = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ()
    return any(symbol_is_type(s, SymT.UNBACKED_INT) for s in symbols)


def _expression(size: Size) -> object:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def module_path(node: Node) -> tuple[str, ...]:
    """The module the node was traced in, as the parts of its dotted name; () for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values() if not entry[0].startswith("_empty_nn_module")]
    name = names[-1].split("@")[0] if names else ""
    return tuple(name.split(".")) if name else ()


def common_module(nodes: Iterable[Node]) -> str:
    """The innermost module that holds every node: a layer's name."""
    paths = [module_path(n) for n in nodes]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def source(node: Node, module: str = "") -> str:
    """The "file.py:123" of the user's code behind a node, innermost in the file that defines `module`.

    Libraries run experts from shared code; the line wanted is the model's own. Without a file known for the
    module, the innermost line outside torch.
    """
    owner, stack = defining_file(node, module), stack_of(node)
    chosen = [f for f in stack if f.path == owner] or stack
    return str(chosen[-1].shown) if chosen else ""


def defining_file(node: Node, module: str) -> str:
    """The file that defines the class of a module on the node's stack of modules; "" if it is not known."""
    stack = {entry[0].split("@")[0]: entry[1] for entry in (node.meta.get("nn_module_stack") or {}).values()}
    return _defining_file(stack.get(module, ""))


def _defining_file(owner: object) -> str:
    """The file that defines a class, given as the graph records it: the class itself or its dotted name."""
    qualified = owner if isinstance(owner, str) else str(getattr(owner, "__module__", ""))
    parts = qualified.split(".")
    for end in range(len(parts), 0, -1):
        module = sys.modules.get(".".join(parts[:end]))
        if module is not None:
            return getattr(module, "__file__", "") or ""
    return ""


def mutated_argument(node: Node) -> Node | None:
    """The tensor a node writes in place, if its schema says so."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return None
    for argument, formal in zip(node.args, schema.arguments, strict=False):
        if formal.alias_info is not None and formal.alias_info.is_write and isinstance(argument, Node):
            return argument
    return None


def aliased_argument(node: Node) -> Node | None:
    """The tensor a node's value may share memory with: the input of a view, or of an in-place operator."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    if getattr(node.target, "__name__", "") == "getitem":
        return node.args[0] if aliased_argument(node.args[0]) else None
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    shares = any(r.alias_info is not None for r in schema.returns)
    return node.args[0] if shares or schema.name.split("::")[-1] in _MAY_ALIAS else None


def alias_root(node: Node) -> Node:
    """The value whose memory a chain of views starts from."""
    while (below := aliased_argument(node)) is not None:
        node = below
    return node


def through(node: Node, *kinds: frozenset[Any]) -> Node:
    """Down through operators of the given kinds to the value underneath."""
    while node.op == "call_function" and any(node.target in kind for kind in kinds):
        below = node.args[0]
        assert isinstance(below, Node)
        node = below
    return node


def erase_dead(graph: Graph, replaced: Iterable[Node] = ()) -> int:
    """Erase pure nodes nobody reads; returns how many.

    With them goes what torch.export asserted of the sizes inside a computation that was replaced: an
    assertion all of whose tensors served only to compute one of `replaced`.
    """
    erased = 0
    for node in _asserted_of(graph, list(replaced)):
        graph.erase_node(node)
        erased += 1
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and _is_pure(node):
            graph.erase_node(node)
            erased += 1
    return erased


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """The values that the nodes are computed from, themselves included."""
    found, stack = set[Node](), list(nodes)
    while stack:
        at = stack.pop()
        if at not in found:
            found.add(at)
            stack.extend(at.all_input_nodes)
    return found


def _asserted_of(graph: Graph, replaced: list[Node]) -> list[Node]:
    if not replaced:
        return []
    assertions = [n for n in graph.nodes if n.target is aten._assert_scalar.default]
    kept = [n for n in graph.nodes if n not in set(assertions) and (n.op == "output" or not _is_pure(n))]
    live, inside = ancestors(kept), ancestors(replaced)
    return [
        n
        for n in assertions
        if (dead := ancestors([n]) - live - {n}) and all(a in inside for a in dead if not _is_number(a))
    ]


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymBool, torch.SymFloat))


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return node.op != "output"
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__module__", "") in ("_operator", "math", "builtins", "torch")
    if schema.is_mutable:
        return False
    return not schema.name.startswith(("aten::_assert", "aten::sym_constrain", "aten::_functional_assert"))
