"""Tensors read into memory that is there already, once each, cast and unscaled on the way."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dsmoe_compiler.checkpoint import reader as reading
from dsmoe_compiler.checkpoint.errors import CheckpointError
from dsmoe_compiler.checkpoint.header import read_header
from dsmoe_compiler.checkpoint.reader import Reader
from dsmoe_compiler.checkpoint.sources import BlockScaled, main_dtype, with_scales
from dsmoe_compiler.interrupt import Deferred


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_as_torch_casts(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
    into: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    monkeypatch.setattr(reading, "_PIECE", 8)  # several pieces to each
    value = drawn(*shape, dtype=stored)
    save_file({"before": drawn(3), "value": value, "after": drawn(3)}, file)
    found = torch.full(shape, torch.nan, dtype=into)
    with Reader() as reader:
        reader.fill(found, read_header(file)["value"])
    assert found.equal(value.to(into))
    assert reader.bytes_read == value.nbytes


def test_into_a_part_of_a_parameter_and_nowhere_else(file: Path) -> None:
    save_file({"up": drawn(4, 6)}, file)
    stacked = torch.nn.Parameter(torch.zeros(3, 8, 6))
    with Reader() as reader:
        reader.fill(stacked[1, 4:], read_header(file)["up"])
    assert stacked[1, 4:].equal(drawn(4, 6))
    assert stacked.count_nonzero() == 24


def test_what_is_no_place_to_read_into(file: Path) -> None:
    save_file({"a": drawn(4, 6)}, file)
    source = read_header(file)["a"]
    with Reader() as reader:
        with pytest.raises(ValueError, match=r"\[4, 6\] does not go into \[6, 4\]"):
            reader.fill(torch.empty(6, 4), source)
        with pytest.raises(ValueError, match="only contiguous memory"):
            reader.fill(torch.empty(6, 4).t(), source)
        with pytest.raises(ValueError, match="only contiguous memory"):
            reader.fill(torch.empty(4, 6, device="meta"), source)


def test_a_file_that_shrinks_after_its_header_was_read(file: Path) -> None:
    save_file({"a": drawn(4, 6)}, file)
    source = read_header(file)["a"]
    file.write_bytes(file.read_bytes()[:-1])
    with Reader() as reader, pytest.raises(CheckpointError, match="cut off within a while it was read"):
        reader.fill(torch.empty(4, 6), source)
    file.unlink()
    with Reader() as reader, pytest.raises(CheckpointError, match=r"a cannot be read \(No such file"):
        reader.fill(torch.empty(4, 6), source)


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """As in the foreground: a process that a shell started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_is_obeyed_between_pieces(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PIECE", 8)
    save_file({"a": drawn(4, 6)}, file)
    source, found = read_header(file)["a"], torch.zeros(4, 6)
    with pytest.raises(KeyboardInterrupt), Reader() as reader, Deferred():
        signal.raise_signal(signal.SIGINT)
        reader.fill(found, source)
    assert reader.bytes_read == 0 and not found.any()


def scaled(file: Path, shape: tuple[int, ...], block: tuple[int, int]) -> tuple[BlockScaled, Tensor]:
    """A float8 tensor in a file, and what it is."""
    *stack, rows, columns = shape
    values = (8 * drawn(*shape)).to(torch.float8_e4m3fn)
    scales = drawn(*stack, -(-rows // block[0]), -(-columns // block[1])).abs() + 0.5
    save_file({"w": values, "w_scale_inv": scales}, file)
    (source,) = with_scales(read_header(file), block).values()
    assert isinstance(source, BlockScaled) and source.shape == shape
    spread = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :rows, :columns]
    return source, values.float() * spread


@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_blocks_of_any_shape_are_unscaled(
    tmp_path_factory: pytest.TempPathFactory,
    stack: list[int],
    matrix: tuple[int, int],
    block: tuple[int, int],
) -> None:
    source, exact = scaled(tmp_path_factory.mktemp("w") / "w.safetensors", (*stack, *matrix), block)
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.full(exact.shape, torch.nan, dtype=dtype)
        with Reader() as reader:
            reader.fill(found, source)
        assert found.equal(exact.to(dtype))
        assert reader.bytes_read == source.values.size + source.scales.size


def test_float8_with_ragged_blocks_of_128(file: Path) -> None:
    source, exact = scaled(file, (2, 300, 131), (128, 128))
    assert source.scales.shape == (2, 3, 2)
    found = torch.empty(exact.shape, dtype=torch.bfloat16)
    with Reader() as reader:
        reader.fill(found, source)
    assert found.equal(exact.bfloat16())


def test_the_dtype_of_most_bytes(file: Path) -> None:
    save_file({"a": drawn(9), "b": drawn(30, dtype=torch.bfloat16), "c": torch.ones(99).long()}, file)
    assert main_dtype(read_header(file)) is torch.bfloat16
    save_file({"a": drawn(16), "b": drawn(30, dtype=torch.bfloat16)}, file)
    assert main_dtype(read_header(file)) is torch.float32
    assert main_dtype({}) is torch.bfloat16
