"""What differs is found, what does not is not, and what was not looked at is said."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from dsmoe_compiler.graph_diff.change import Change
from dsmoe_compiler.graph_diff.compare import GraphDiff, Rewired, compare
from dsmoe_compiler.graph_diff.content import Content, Held, InFile, digest, same_content, same_turned
from dsmoe_compiler.graph_diff.facts import GraphFacts, Layer, Size, Tensor, TensorType, Value
from dsmoe_compiler.graph_diff.tensor_changes import TOO_MANY, USUAL_BYTES, Unread

ROW = TensorType("f32", ("s0", 4))
BASE = GraphFacts(
    source="base",
    form="ONNX file",
    vocabulary="ONNX",
    size=Size(2, 0, 0, 100, 16),
    operators={"Relu": 1, "Add": 1},
    wiring=("%0 = Relu(%x)", "%1 = Add(%0, @w)"),
    tensors=(),
    inputs=(Value("x", ROW), Value("z", ROW)),
    outputs=(Value("y", ROW),),
    layers=(Layer("mlp", True, "spec"),),
    properties={"opset": "20"},
)


def tensor(name: str, data: bytes | None = b"1234", dtype: str = "u8") -> Tensor:
    size = 4 if data is None else len(data)
    return Tensor(name, TensorType(dtype, (size,)), size, None if data is None else Held(data))


def between(a: GraphFacts, b: GraphFacts, most_bytes: int | None = USUAL_BYTES) -> GraphDiff:
    return compare(a, b, most_bytes)


def with_tensors(*tensors: Tensor) -> GraphFacts:
    return replace(BASE, tensors=tensors)


def test_a_graph_is_the_same_as_itself_in_everything() -> None:
    found = between(BASE, replace(BASE, source="other", size=Size(2, 0, 0, 101, 16)))
    assert found.same and found.left_out == ()


@dataclass(frozen=True)
class Differs:
    """A change, and the one part of the answer that tells of it."""

    part: str
    changed: GraphFacts
    told: list[tuple[str, object, object]]


FUSED, WRITTEN = Layer("mlp", True, "spec"), Layer("mlp", False)
HALF = TensorType("f16", ("s0", 4))
X, Z = BASE.inputs
CHANGES = [
    Differs(
        "operators",
        replace(BASE, operators={"Relu": 2, "Mul": 1}),
        [("Add", 1, None), ("Mul", None, 1), ("Relu", 1, 2)],
    ),
    Differs("layers", replace(BASE, layers=(WRITTEN,)), [("mlp", FUSED, WRITTEN)]),
    Differs("layers", replace(BASE, layers=()), [("mlp", FUSED, None)]),
    Differs("inputs", replace(BASE, inputs=(X,)), [("z", Z, None)]),
    Differs("inputs", replace(BASE, inputs=(Z, X)), [("at place 0", X, Z), ("at place 1", Z, X)]),
    Differs(
        "outputs", replace(BASE, outputs=(Value("y", HALF),)), [("y", Value("y", ROW), Value("y", HALF))]
    ),
    Differs(
        "properties",
        replace(BASE, properties={"opset": "21", "target": "ort"}),
        [("opset", "20", "21"), ("target", None, "ort")],
    ),
]


@pytest.mark.parametrize("case", CHANGES)
def test_each_part_tells_of_its_own(case: Differs) -> None:
    found = between(BASE, case.changed)
    assert not found.same
    assert getattr(found, case.part) == tuple(Change(*change) for change in case.told)
    others = {"operators", "layers", "inputs", "outputs", "properties"} - {case.part}
    assert not any(getattr(found, part) for part in others) and found.rewired is None


@pytest.mark.parametrize(
    ("wiring", "told"),
    [
        (("%0 = Relu(%z)", "%1 = Add(%0, @w)"), Rewired(1, "%0 = Relu(%x)", "%0 = Relu(%z)")),
        (BASE.wiring[:1], Rewired(2, "%1 = Add(%0, @w)", "")),
        ((*BASE.wiring, "   return %1"), Rewired(3, "", "return %1")),
    ],
)
def test_the_same_operators_wired_otherwise_are_no_same_graph(wiring: tuple[str, ...], told: Rewired) -> None:
    found = between(BASE, replace(BASE, wiring=wiring))
    assert not found.same and found.operators == () and found.rewired == told


def test_tensors_by_name_type_and_numbers() -> None:
    a = with_tensors(tensor("gone", b"9"), tensor("cast"), tensor("new numbers"), tensor("kept"))
    after = (
        tensor("kept"),
        tensor("cast", dtype="i8"),
        tensor("new numbers", b"1235"),
        tensor("came", b"88"),
    )
    found = between(a, with_tensors(*after)).tensors
    assert [t.name for t in found.removed] == ["gone"]
    assert [t.name for t in found.added] == ["came"]
    assert found.changed == (Change("cast", tensor("cast"), tensor("cast", dtype="i8")),)
    assert [t.name for t in found.rewritten] == ["new numbers"]
    assert (found.same, found.renamed, found.unread) == (1, (), ())


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [(b"1234", None, "B has none"), (None, b"1234", "A has none"), (None, None, "neither has any")],
)
def test_numbers_nobody_has_are_told_and_no_difference(a: bytes | None, b: bytes | None, why: str) -> None:
    found = between(with_tensors(tensor("w", a)), with_tensors(tensor("w", b)))
    assert found.same and found.tensors.unread == (Unread(1, 4, why),)


def test_a_budget_reads_the_smallest_first() -> None:
    def side(last: bytes) -> GraphFacts:
        return with_tensors(*(tensor(f"w{n}", bytes(n) + last) for n in (5, 1, 3)))

    a, b = side(b"a"), side(b"b")
    for most, read in ((1, 0), (2, 1), (5, 1), (6, 2), (12, 3), (None, 3)):
        found = between(a, b, most)
        assert [t.name for t in found.tensors.rewritten] == ["w1", "w3", "w5"][:read]
        left = 3 - read
        assert [(u.count, u.why) for u in found.tensors.unread] == ([(left, TOO_MANY)] if left else [])


def test_one_name_for_another_where_only_one_fits() -> None:
    a = with_tensors(
        tensor("old.1", b"aa"), tensor("zeros.1", b"00"), tensor("zeros.2", b"00"), tensor("t", b"xx")
    )
    b = with_tensors(tensor("new.1", b"aa"), tensor("zeros.3", b"00"), tensor("t2", b"xx", dtype="i8"))
    found = between(a, b).tensors
    assert [(x.name, y.name) for x, y in found.renamed] == [("old.1", "new.1")]
    assert [t.name for t in found.removed] == ["t", "zeros.1", "zeros.2"]
    assert [t.name for t in found.added] == ["t2", "zeros.3"]
    unread = between(a, b, most_bytes=1)
    assert unread.tensors.renamed == () and len(unread.tensors.removed) == 4


def test_tensors_of_one_name_are_told_apart() -> None:
    a, b = with_tensors(tensor("w"), tensor("w", b"2222")), with_tensors(tensor("w"), tensor("w", b"2223"))
    assert between(a, a).same
    assert [t.name for t in between(a, b).tensors.rewritten] == ["w"]


def test_of_two_kinds_what_both_have_is_compared() -> None:
    torch_side = replace(
        BASE,
        vocabulary="ATen",
        form="captured graph",
        operators={"relu": 1},
        properties={},
        outputs=(Value("output 0", ROW),),
        inputs=(Value("x", TensorType("f32", ("batch", 4))), Value("z", TensorType("f32", None))),
    )
    found = between(torch_side, BASE)
    assert found.same and found.operators is None and found.rewired is None
    assert any("operators, their wiring and properties are not compared" in line for line in found.left_out)


@pytest.mark.parametrize("shape", [("s0", 5), ("s0", "s1"), ("s0",), (3, 4)])
def test_of_two_kinds_other_sizes_are_a_difference(shape: tuple[int | str, ...]) -> None:
    other = replace(BASE, vocabulary="ATen", outputs=(Value("a", TensorType("f32", shape)),))
    (change,) = between(BASE, other).outputs
    assert change.name == "output 0" and change.after is not None and change.after.type.shape == shape


def test_layers_nobody_knows_are_not_compared() -> None:
    unknown = replace(BASE, layers=None)
    found = between(BASE, unknown)
    assert found.same and found.layers is None
    assert found.left_out == ("MoE layers are not compared: B does not say which it has",)
    assert between(unknown, unknown).left_out == ("MoE layers are not compared: neither says which it has",)


@dataclass
class Counting:
    """Bytes that remember what was read of them; all zero but the first and the last."""

    size: int
    last: int = 0
    available: bool = True
    reads: list[tuple[int, int]] = field(default_factory=list)
    first: int = 0

    def read(self, start: int, stop: int) -> bytes:
        self.reads.append((start, stop))
        data = bytearray(stop - start)
        if start == 0:
            data[0] = self.first
        if stop == self.size:
            data[-1] = self.last
        return bytes(data)


def test_large_tensors_are_read_in_pieces_up_to_the_first_difference() -> None:
    size = 10 << 20
    a, b, c = Counting(size), Counting(size, last=1), Counting(size, first=1)
    assert not same_content(a, b)
    assert [stop for _, stop in a.reads] == [4 << 20, 8 << 20, size]
    a.reads.clear()
    assert not same_content(a, c)
    assert len(a.reads) == 1
    assert same_content(a, Counting(size)) and not same_content(a, Counting(size - 1))
    assert digest(a) == digest(Held(bytes(size))) != digest(b)


@pytest.mark.parametrize("make", [lambda p: InFile(p, 2, 3), lambda p: Held(b"cde")])
def test_parts_of_files_read_as_what_they_hold(tmp_path: Path, make: Callable[[Path], Content]) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abcdef")
    content = make(path)
    assert content.available and content.size == 3 and content.read(1, 3) == b"de"
    assert same_content(content, Held(b"cde")) and not same_content(content, Held(b"cdf"))


def test_the_same_part_of_a_file_is_not_read(tmp_path: Path) -> None:
    gone = InFile(tmp_path / "gone", 0, 4)
    assert not gone.available and gone == InFile(tmp_path / "gone", 0, 4)
    a = with_tensors(replace(tensor("w"), content=gone))
    found = between(a, with_tensors(replace(tensor("w"), content=InFile(tmp_path / "gone", 0, 4))))
    assert found.same and found.tensors.unread == ()


def _matrix(name: str, rows: int, columns: int, data: bytes, dtype: str = "u8") -> Tensor:
    return Tensor(name, TensorType(dtype, (rows, columns)), len(data), Held(data))


def test_transposes_are_told_from_other_shapes_and_other_numbers() -> None:
    a = with_tensors(
        _matrix("wide", 2, 3, b"abcdef"),
        _matrix("square", 2, 2, b"abcd"),
        _matrix("other", 2, 3, b"abcdef"),
        _matrix("rewritten", 2, 2, b"abcd"),
        _matrix("empty", 0, 3, b""),
    )
    b = with_tensors(
        _matrix("wide", 3, 2, b"adbecf"),
        _matrix("square", 2, 2, b"acbd"),
        _matrix("other", 3, 2, b"abcdef"),
        _matrix("rewritten", 2, 2, b"acbe"),
        _matrix("empty", 3, 0, b""),
    )
    found = between(a, b).tensors
    assert [c.name for c in found.turned] == ["square", "wide"]
    assert [c.name for c in found.changed] == ["empty", "other"]
    assert [t.name for t in found.rewritten] == ["rewritten"]
    unread = between(a, b, most_bytes=0).tensors
    assert unread.turned == () and {c.name for c in unread.changed} == {"wide", "other", "empty"}


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (5, 3), (2, 4)])
def test_matrices_of_any_element_are_turned(itemsize: int, rows: int, columns: int) -> None:
    items = [bytes([i] * itemsize) for i in range(rows * columns)]
    turned = [items[i * columns + j] for j in range(columns) for i in range(rows)]
    a, b = Held(b"".join(items)), Held(b"".join(turned))
    assert same_turned(a, b, rows, columns) and same_turned(b, a, columns, rows)
    other = Held(b.data[:-1] + b"\xff")
    assert not same_turned(a, other, rows, columns) and not same_turned(a, b, 3 * rows, 3 * columns)


def test_matrices_with_other_corners_are_not_read() -> None:
    a, b = Counting(16 << 20), Counting(16 << 20, last=1)
    assert not same_turned(a, b, 4 << 10, 1 << 10)
    assert sum(stop - start for start, stop in a.reads) == 2 * 4


@pytest.mark.parametrize(("a", "b"), [(6, 7), (7, 7), (13, 13)])
def test_bytes_that_do_not_fit_their_shape_are_not_turned(a: int, b: int) -> None:
    assert not same_turned(Held(b"a" * a), Held(b"a" * b), 2, 3)


def test_numbers_of_half_a_byte_are_not_turned() -> None:
    assert not same_turned(Held(b"ab"), Held(b"ab"), 2, 2)
