"""How a config.json says that weights are quantised."""

from __future__ import annotations

from collections.abc import Mapping

_DEEPSEEK_BLOCK = (128, 128)  # what the released float8 checkpoints have, and the default


def is_plain_or_block_fp8(fields: Mapping[str, object]) -> bool:
    """Whether a config.json has no quantisation but float8 in blocks, which is undone while reading."""
    found = fields.get("quantization_config")
    return found is None or (isinstance(found, Mapping) and found.get("quant_method") == "fp8")


def fp8_block(fields: Mapping[str, object]) -> tuple[int, int]:
    """Rows and columns of the blocks that share a scale. Raises ValueError, one line, for other scales."""
    quantization = fields.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return _DEEPSEEK_BLOCK
    match quantization.get("weight_block_size", list(_DEEPSEEK_BLOCK)):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case found:
            raise ValueError(
                f"weight_block_size of quantization_config is {found!r}; float8 is read in blocks "
                "of [rows, columns]"
            )
