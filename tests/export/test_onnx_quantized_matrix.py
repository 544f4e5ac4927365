"""Products of quantised matrices: onnxruntime and ONNX's own evaluator read what was written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ml_dtypes = pytest.importorskip("ml_dtypes")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from dsmoe_compiler.export.onnx.build import Builder  # noqa: E402
from dsmoe_compiler.export.onnx.quantize import Blockwise, dequantize, quantize  # noqa: E402
from dsmoe_compiler.export.onnx.quantized_matrix import (  # noqa: E402
    OPSET,
    Weights,
    form_of,
    quantized,
)
from dsmoe_compiler.export.onnx.stacks import Stack  # noqa: E402
from dsmoe_compiler.ir.errors import InputError  # noqa: E402

Array = np.ndarray[Any, np.dtype[Any]]

WIDTHS: tuple[Weights, ...] = ("int8", "int4")
EXPERTS, IN, OUT = 3, 72, 40  # a last block of 8 inputs
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# The sums of a product, in float32, in any order.
_SUMMED = 1e-5


@dataclass
class Experts:
    """Matrices (in, out), kept as (out, in) where `transposed`, that know when they are read."""

    matrices: list[Array]
    transposed: bool = True
    reads: list[int] = field(default_factory=list)

    def stack(self, name: str = "experts") -> Stack:
        shape = self.matrices[0].shape[::-1] if self.transposed else self.matrices[0].shape
        names = tuple(f"{name}.{e}.weight" for e in range(len(self.matrices)))
        dtype = ir.DataType.from_numpy(self.matrices[0].dtype)
        return Stack(names, shape, dtype, self._read)

    def _read(self, expert: int) -> Array:
        self.reads.append(expert)
        return self.matrices[expert].T.copy() if self.transposed else self.matrices[expert]


def random_experts(dtype: str = "float32", transposed: bool = True, seed: int = 0) -> Experts:
    random = np.random.default_rng(seed)
    made = [random.standard_normal((IN, OUT)).astype(_DTYPES[dtype]) for _ in range(EXPERTS)]
    return Experts(made, transposed)


def rows(count: int, dtype: str = "float32", seed: int = 1) -> Array:
    made: Array = np.random.default_rng(seed).standard_normal((count, IN)).astype(_DTYPES[dtype])
    return made


def products(experts: Experts, weights: Weights, symmetric: bool | None) -> tuple[Any, Any]:
    """A model of x (T, in) and every expert's product with it, and its errors."""
    stack = experts.stack()
    x = ir.Value(
        name="x", shape=ir.Shape(["T", stack.shape[experts.transposed]]), type=ir.TensorType(stack.dtype)
    )
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": OPSET}, name="products")
    to = Builder(graph, "layer/experts")
    matrix, errors = quantized(weights, symmetric)
    for e in range(len(experts.matrices)):
        y = to.op("MatMul", x, matrix(to, stack, e, experts.transposed))
        y.shape, y.type = ir.Shape(["T", experts.matrices[e].shape[1]]), ir.TensorType(stack.dtype)
        graph.outputs.append(y)
    graph.extend(to.nodes)
    return ir.Model(graph, ir_version=10), errors


def written(model: Any, folder: Path) -> Path:
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data", size_threshold_bytes=0, max_workers=1)
    onnx.checker.check_model(path, full_check=True)
    return path


def session(path: Path, accuracy_level: str | None = None) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    if accuracy_level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy_level)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def evaluated(path: Path, x: Array) -> list[Array]:
    """What ONNX's own evaluator gives."""
    found: list[Array] = ReferenceEvaluator(str(path)).run(None, {"x": x})  # type: ignore[assignment]
    return found


def run(path: Path, x: Array, accuracy_level: str | None = None) -> list[Array]:
    """What onnxruntime gives."""
    found: list[Array] = session(path, accuracy_level).run(None, {"x": x})
    return found


def back(matrix: Array, form: Blockwise) -> Array:
    return dequantize(quantize(matrix, form)).astype(np.float64)


def rounded_rows(x: Array, matrix: Array) -> Array:
    """How far a product may be off where x is rounded to whole numbers up to 127, a scale for 32 of them:
    half a scale an element, times its weights.
    """
    bound = np.zeros((x.shape[0], matrix.shape[1]))
    for start in range(0, x.shape[1], 32):
        largest = np.abs(x[:, start : start + 32]).max(1, keepdims=True, initial=0.0)
        bound += largest / 254 * np.abs(matrix[start : start + 32]).sum(0)
    return bound


@pytest.mark.parametrize("transposed", [True, False], ids=["out-in", "in-out"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("weights", WIDTHS)
def test_onnx_reads_the_numbers_that_were_meant(
    tmp_path: Path, weights: Weights, symmetric: bool, transposed: bool
) -> None:
    experts = random_experts(transposed=transposed)
    model, _ = products(experts, weights, symmetric)
    x = rows(5)
    found = evaluated(written(model, tmp_path), x)
    for y, matrix in zip(found, experts.matrices, strict=True):
        kept = back(matrix, form_of(weights, symmetric))
        assert (np.abs(y - x @ kept) <= _SUMMED * (np.abs(x) @ np.abs(kept))).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("weights", WIDTHS)
def test_onnxruntime_multiplies_whole_numbers(tmp_path: Path, weights: Weights, symmetric: bool) -> None:
    version = pytest.importorskip("onnxruntime").__version__
    if weights == "int8" and tuple(map(int, version.split(".")[:2])) < (1, 25):
        pytest.skip("older versions dequantise the matrix for every call")
    model, _ = products(random_experts(), weights, symmetric)
    session(written(model, tmp_path))
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert Counter(node.op_type for node in nodes) == {"MatMulNBits": EXPERTS}
    bits = [a.i for node in nodes for a in node.attribute if a.name == "bits"]
    assert bits == [int(weights[3:])] * EXPERTS


@pytest.mark.parametrize("count", [0, 1, 5, 33])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("weights", WIDTHS)
def test_onnxruntime_gives_the_products(
    tmp_path: Path, weights: Weights, symmetric: bool, count: int
) -> None:
    experts = random_experts()
    path = written(products(experts, weights, symmetric)[0], tmp_path)
    x = rows(count)
    kept = [back(matrix, form_of(weights, symmetric)) for matrix in experts.matrices]
    for y, matrix in zip(run(path, x), kept, strict=True):
        summed = _SUMMED * (np.abs(x) @ np.abs(matrix))
        assert y.shape == (count, OUT)
        assert (np.abs(y - x @ matrix) <= rounded_rows(x, matrix) + summed).all()
    for y, matrix in zip(run(path, x, accuracy_level="1"), kept, strict=True):
        assert (np.abs(y - x @ matrix) <= _SUMMED * (np.abs(x) @ np.abs(matrix))).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("weights", WIDTHS)
@pytest.mark.parametrize("inputs", [1, 20, 31, 33, 64])
def test_blocks_may_end_anywhere(tmp_path: Path, weights: Weights, symmetric: bool, inputs: int) -> None:
    random = np.random.default_rng(inputs)
    experts = Experts([random.standard_normal((inputs, 7)).astype(np.float32)])
    path = written(products(experts, weights, symmetric)[0], tmp_path)
    x = random.standard_normal((4, inputs)).astype(np.float32)
    kept = back(experts.matrices[0], form_of(weights, symmetric))
    for (y,) in (evaluated(path, x), run(path, x, accuracy_level="1")):
        assert (np.abs(y - x @ kept) <= _SUMMED * (np.abs(x) @ np.abs(kept))).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("weights", WIDTHS)
def test_narrow_floats_keep_their_dtype(tmp_path: Path, weights: Weights, dtype: str) -> None:
    experts = random_experts(dtype)
    model, _ = products(experts, weights, None)
    path = written(model, tmp_path)
    scale = model.graph.initializers["experts.0.weight.scale"]
    assert scale.dtype == ir.DataType.from_numpy(experts.matrices[0].dtype)
    x = rows(3, dtype)
    ulp = float(ml_dtypes.finfo(_DTYPES[dtype]).eps)
    found = [evaluated(path, x)]
    if dtype == "float16":  # onnxruntime multiplies no bfloat16 on a CPU
        found.append(run(path, x, accuracy_level="1"))
    for values in found:
        for y, matrix in zip(values, experts.matrices, strict=True):
            kept = back(matrix, form_of(weights))
            wide = x.astype(np.float64)
            # Each of IN products and sums may be rounded to the dtype.
            assert y.dtype == x.dtype
            assert (
                np.abs(y.astype(np.float64) - wide @ kept) <= IN * ulp * (np.abs(wide) @ np.abs(kept))
            ).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("weights", "allowed"), [("int8", 0.30), ("int4", 0.17)])
def test_the_file_is_as_small_as_promised(
    tmp_path: Path, weights: Weights, allowed: float, symmetric: bool
) -> None:
    experts = Experts([np.ones((256, 128), np.float32)] * 2)
    written(products(experts, weights, symmetric)[0], tmp_path)
    plain = sum(matrix.nbytes for matrix in experts.matrices)
    assert (tmp_path / "model.onnx.data").stat().st_size <= allowed * plain


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("weights", WIDTHS)
def test_the_reported_error_bounds_every_product(tmp_path: Path, weights: Weights, symmetric: bool) -> None:
    experts = random_experts()
    model, errors = products(experts, weights, symmetric)
    path, x = written(model, tmp_path), rows(9)
    (error,) = errors.layers()
    norm = np.sqrt(sum((m.astype(np.float64) ** 2).sum() for m in experts.matrices))
    apart = [y - x.astype(np.float64) @ m for y, m in zip(evaluated(path, x), experts.matrices, strict=True)]
    # |x · (ŵ − w)| ≤ Σ|x| · max|ŵ − w|, and ‖x · (ŵ − w)‖ ≤ ‖x‖ · ‖ŵ − w‖.
    summed = 1 + 1e-3
    for differs in apart:
        assert (np.abs(differs) <= summed * error.largest * np.abs(x).sum(1, keepdims=True)).all()
    together = np.sqrt(sum((d**2).sum() for d in apart))
    assert together <= summed * np.linalg.norm(x) * error.relative_l2 * norm


@pytest.mark.parametrize("weights", WIDTHS)
def test_errors_are_those_of_all_the_experts_of_a_product(tmp_path: Path, weights: Weights) -> None:
    experts = random_experts()
    model, errors = products(experts, weights, None)
    assert errors.layers() == ()
    for _ in range(2):  # written twice, counted once
        written(model, tmp_path)
        (tmp_path / "model.onnx.data").unlink()
        apart = np.stack([back(m, form_of(weights)) - m for m in experts.matrices])
        (error,) = errors.layers()
        expected = np.linalg.norm(apart.ravel()) / np.linalg.norm(np.stack(experts.matrices).ravel())
        assert (error.name, error.bits) == ("layer/experts", int(weights[3:]))
        assert error.relative_l2 == pytest.approx(expected, rel=1e-5)
        assert error.largest == pytest.approx(np.abs(apart).max(), rel=1e-5)


@pytest.mark.parametrize("weights", WIDTHS)
def test_a_matrix_is_read_once_and_only_when_it_is_written(tmp_path: Path, weights: Weights) -> None:
    experts = random_experts()
    model, _ = products(experts, weights, symmetric=False)
    assert experts.reads == []
    written(model, tmp_path)
    assert experts.reads == list(range(EXPERTS))


def test_initializers_written_in_any_order_are_the_same(tmp_path: Path) -> None:
    model, _ = products(random_experts(), "int4", False)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    forwards = {name: tensors[name].tobytes() for name in tensors}
    assert {name: tensors[name].tobytes() for name in sorted(tensors, reverse=True)} == forwards


def test_defaults() -> None:
    assert form_of("int8") == Blockwise(8, 32, symmetric=True)
    assert form_of("int4") == Blockwise(4, 32, symmetric=False)
    assert form_of("int8", False) == Blockwise(8, 32, symmetric=False)
    assert form_of("int4", True) == Blockwise(4, 32, symmetric=True)


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    experts = random_experts()
    experts.matrices[1][3, 5] = np.nan
    model, _ = products(experts, "int8", None)
    with pytest.raises(InputError, match=r"experts\.1\.weight: weights to quantise are finite"):
        written(model, tmp_path)


def test_double_precision_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"experts\.0\.weight: DOUBLE weights cannot be quantised"):
        products(Experts([np.ones((32, 4))]), "int8", None)
