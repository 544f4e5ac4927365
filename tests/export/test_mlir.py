"""MLIR of fused programs: what it says, that torch-mlir's tools read it, and that it computes the same."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dsmoe_compiler as dsmoe
from dsmoe_compiler.export.mlir.write import Dialect, export_mlir
from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.program import Program
from tests.tiny_models import Experts, relative, tiny, tokens
from tests.transformers_models import family

torch_mlir = pytest.importorskip("torch_mlir")

from tests.export.linalg_on_cpu import LinalgOnCpu  # noqa: E402

TORCH_MLIR_OPT = Path(torch_mlir.__path__[0]) / "_mlir_libs" / "torch-mlir-opt"
DIALECTS: tuple[Dialect, ...] = ("torch", "linalg")


class Layer(nn.Module):
    """The layer in a model: tokens (B, L, D) become rows and sequences again."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.experts(x.reshape(-1, x.shape[-1])).view(x.shape)
        return out


class Grouped(Experts):
    """Experts that the best two of four groups hold, as in DeepSeek-V3."""

    def forward(self, x: Tensor) -> Tensor:
        scores = nn.functional.linear(x, self.gate).sigmoid()
        grouped = scores.view(-1, 4, 2)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
        mask = torch.zeros(x.shape[0], 4).scatter(1, best, 1.0).unsqueeze(-1).expand(-1, 4, 2)
        allowed = scores.masked_fill(~mask.reshape(-1, 8).bool(), 0.0)
        ids = allowed.topk(2, dim=-1).indices
        weights = scores.gather(1, ids)
        rows, pairs = x.repeat_interleave(2, 0), ids.reshape(-1)
        gate, up = torch.bmm(self.gate_up[pairs], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.down[pairs], (nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(*ids.shape, y.shape[-1]).sum(1)


@pytest.fixture(scope="module")
def program() -> Program:
    return dsmoe.compile(Layer(), (torch.rand(2, 3, 16),), verify="off", require_fused=True)


@pytest.fixture(scope="module")
def texts(program: Program) -> dict[str, str]:
    return {dialect: export_mlir(program.exported, dialect=dialect) for dialect in DIALECTS}


def test_a_layer_is_one_operator_with_its_spec(program: Program, texts: dict[str, str]) -> None:
    (layer,) = program.report.layers
    text = texts["torch"]
    assert re.findall(r'torch\.operator "(\S+)"', text) == ["torch.dsmoe.moe"]
    (spec,) = re.findall(r'torch\.constant\.str "(.*)"', text)
    assert layer.spec is not None and spec.replace(r"\22", '"') == layer.spec.text


def test_sizes_that_vary_are_bound_to_symbols(texts: dict[str, str]) -> None:
    text = texts["torch"]
    assert "func.func @main(%arg0: !torch.vtensor<[?,?,16],f32>) -> !torch.vtensor<[?,?,16],f32>" in text
    assert len(re.findall("torch.symbolic_int", text)) == 2
    bound = re.findall(r"torch\.bind_symbolic_shape %arg0, .* affine_map<(.*)> :", text)
    assert bound == ["()[s0, s1] -> (s1, s0, 16)"]


def test_linalg_is_of_dialects_that_mlir_itself_has(texts: dict[str, str]) -> None:
    text = texts["linalg"]
    assert "func.func @main(%arg0: tensor<?x?x16xf32>) -> tensor<?x?x16xf32>" in text
    assert not re.search(r"\btorch(_c)?\.\w|tm_tensor", text)
    assert "linalg.batch_matmul" in text


@pytest.mark.parametrize("dialect", DIALECTS)
def test_weights_have_their_names_and_no_bytes(program: Program, texts: dict[str, str], dialect: str) -> None:
    named = re.findall(r"dense_resource<(.*?)> : tensor<(.*?)xf32>", texts[dialect])
    assert sorted(named) == [
        ("experts.down", "8x16x12"),
        ("experts.gate", "8x16"),
        ("experts.gate_up", "8x24x16"),
    ]
    assert "dialect_resources" not in texts[dialect]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("weights", [False, True])
def test_torch_mlir_reads_it_back(program: Program, dialect: Dialect, weights: bool) -> None:
    read_back(export_mlir(program.exported, dialect=dialect, weights=weights))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_bytes_follow_on_request(program: Program, texts: dict[str, str], dialect: Dialect) -> None:
    whole = export_mlir(program.exported, dialect=dialect, weights=True)
    assert whole.startswith(texts[dialect])
    down = program.exported.state_dict["experts.down"].detach().numpy().tobytes().hex().upper()
    assert re.search(rf'experts\.down: "0x04000000{down}"', whole)  # aligned to 4


def test_memory_of_two_names_is_written_once() -> None:
    class Shared(nn.Module):
        a: Tensor
        b: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.rand(32))
            self.register_buffer("b", self.a[:])

        def forward(self, x: Tensor) -> Tensor:
            return x * self.a + self.b

    text = export_mlir(torch.export.export(Shared(), (torch.rand(32),)), weights=True)
    assert len(re.findall(r'"0x[0-9A-F]+"', text)) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_text_is_the_same_every_time_and_tells_no_paths(
    program: Program, texts: dict[str, str], dialect: Dialect
) -> None:
    assert export_mlir(program.exported, dialect=dialect) == texts[dialect]
    assert "loc(" not in texts[dialect] and ".py" not in texts[dialect]


def test_the_program_is_left_as_it_was(program: Program) -> None:
    before = str(program.exported)
    x = torch.rand(1, 2, 16)
    expected = program(x)
    for dialect in DIALECTS:
        export_mlir(program.exported, dialect=dialect)
    assert str(program.exported) == before
    assert torch.equal(program(x), expected)


def test_linalg_computes_the_same_at_every_shape(program: Program) -> None:
    model = Layer()
    run = LinalgOnCpu(export_mlir(program.exported, dialect="linalg", weights=True))
    for shape in ((2, 3), (3, 5), (1, 1), (4, 1), (1, 7)):
        x = torch.randn(*shape, 16)
        assert relative(run(x), model(x)) < 1e-6, shape
    assert run(torch.rand(2, 0, 16)).shape == (2, 0, 16)


def test_linalg_of_a_router_by_groups_computes_the_same() -> None:
    model = Grouped()
    program = dsmoe.compile(model, (torch.randn(6, 16),), verify="off", require_fused=True)
    assert all(
        layer.spec and layer.spec.router and layer.spec.router.groups == 4 for layer in program.report.layers
    )
    text = export_mlir(program.exported, dialect="linalg", weights=True)
    assert "tm_tensor" not in text
    run = LinalgOnCpu(text)
    for rows in (6, 11):
        x = torch.randn(rows, 16)
        assert relative(run(x), model(x)) < 1e-6


def test_what_the_dialect_has_no_operator_for_is_spelled_out() -> None:
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.diff(x, dim=-1)

    exported = torch.export.export(Steps(), (torch.rand(2, 5),))
    assert "torch.operator" not in export_mlir(exported)


def test_sizes_that_turned_out_fixed_are_numbers() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(16, 4)

    program = dsmoe.compile(Fixed(), (torch.rand(3, 16),), verify="off")
    assert "%arg0: tensor<?x16xf32>" in export_mlir(program.exported, dialect="linalg")


def test_a_file_is_written_whole(program: Program, texts: dict[str, str], tmp_path: Path) -> None:
    assert export_mlir(program.exported, path=tmp_path / "layer.mlir") == texts["torch"]
    assert (tmp_path / "layer.mlir").read_text() == texts["torch"]
    assert [each.name for each in tmp_path.iterdir()] == ["layer.mlir"]
    with pytest.raises(InputError, match="cannot be written"):
        export_mlir(program.exported, path=tmp_path / "nowhere" / "layer.mlir")


def test_an_unknown_dialect_is_refused(program: Program) -> None:
    with pytest.raises(InputError, match="dialect='tosa': choose one of 'torch', 'linalg'"):
        export_mlir(program.exported, dialect="tosa")  # type: ignore[arg-type]


@pytest.fixture
def without_torch_mlir(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(sys.modules):
        if name.split(".")[0] == "torch_mlir" or name == "dsmoe_compiler.export.mlir.lower":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_mlir", None)
    yield


@pytest.mark.usefixtures("without_torch_mlir")
def test_without_torch_mlir_the_extra_is_named(program: Program) -> None:
    with pytest.raises(InputError, match=re.escape('pip install "dsmoe-compiler[mlir]"')):
        export_mlir(program.exported)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_sizes_in_floating_point_are_refused(dialect: Dialect) -> None:
    class Capacity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(0) < max(int(x.shape[0] * 1.25 / 4), 2)

    program = dsmoe.compile(Capacity(), (torch.rand(8, 4),), verify="off")
    with pytest.raises(InputError, match="computes a size in floating point .* dynamic_shapes=None"):
        export_mlir(program.exported, dialect=dialect)
    program = dsmoe.compile(Capacity(), (torch.rand(8, 4),), verify="off", dynamic_shapes=None)
    assert "func.func @main" in export_mlir(program.exported, dialect=dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_program_that_writes_to_a_buffer_is_refused(dialect: Dialect) -> None:
    class Counting(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x * self.seen

    exported = torch.export.export(Counting(), (torch.rand(3),))
    with pytest.raises(InputError, match="^seen: the program writes to this buffer"):
        export_mlir(exported, dialect=dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_torch_mlir_cannot_do_is_one_line(dialect: Dialect) -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values: Tensor = torch.linalg.eigvalsh(x)
            return values

    exported = torch.export.export(Spectrum(), (torch.rand(3, 3),))
    if dialect == "torch":
        assert 'torch.operator "torch.aten._linalg_eigh"' in export_mlir(exported)
        return
    with pytest.raises(
        InputError, match="cannot lower this program: .*illegal \\(torch.aten._linalg_eigh\\)$"
    ) as refused:
        export_mlir(exported, dialect=dialect)
    assert "\n" not in str(refused.value)


def test_a_program_that_writes_to_its_input_is_refused_in_linalg() -> None:
    class Adding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return x * 2

    exported = torch.export.export(Adding(), (torch.rand(3),))
    assert "torch.overwrite.tensor.contents" in export_mlir(exported)
    with pytest.raises(InputError, match="cannot lower this program: .*'torch.copy.to_vtensor'$"):
        export_mlir(exported, dialect="linalg")


def read_back(text: str) -> None:
    """Raises where torch-mlir's own tool does not read and verify the text."""
    subprocess.run([TORCH_MLIR_OPT, "-", "-o", "/dev/null"], input=text.encode(), check=True, timeout=60)


@pytest.mark.slow
def test_the_zoo_s_tiny_model() -> None:
    model = tiny()
    program = dsmoe.compile(model, (tokens(2, 8),), verify="off", require_fused=True)
    for dialect in DIALECTS:
        read_back(export_mlir(program.exported, dialect=dialect))
    whole = export_mlir(program.exported, dialect="linalg", weights=True)
    read_back(whole)
    run = LinalgOnCpu(whole)
    for shape in ((2, 3), (1, 5)):
        ids = tokens(*shape, seed=1)
        assert relative(run(ids), model(ids)) < 5e-6, shape


@pytest.mark.slow
def test_a_transformers_model() -> None:
    model = family("gpt_oss")
    ids = tokens(2, 6, vocabulary=96)
    program = dsmoe.compile(model, (ids,), {"use_cache": False}, verify="off", require_fused=True)
    read_back(export_mlir(program.exported))
    run = LinalgOnCpu(export_mlir(program.exported, dialect="linalg", weights=True))
    for shape in ((2, 6), (1, 11)):  # beyond the sliding window of 8
        ids = tokens(*shape, vocabulary=96, seed=1)
        assert relative(run(ids), model(ids, use_cache=False).logits) < 5e-6, shape
