"""Ranges of module paths."""

import pytest

from dsmoe_compiler.report.layer_names import collapse


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["mlp"], "mlp"),
        (["layers.4.mlp"], "layers.4.mlp"),
        (["layers.1.mlp", "layers.2.mlp", "layers.3.mlp"], "layers.{1-3}.mlp"),
        (["layers.9.mlp", "layers.10.mlp", "layers.12.mlp"], "layers.{9-10,12}.mlp"),
        (["encoder.0.moe", "decoder.0.moe", "decoder.1.moe"], "encoder.0.moe, decoder.{0-1}.moe"),
        (["0", "1"], "{0-1}"),
        (["blocks.3"], "blocks.3"),
        (["a.0.b.1", "a.0.b.2"], "a.0.b.{1-2}"),
        (["a.0.b.1", "a.1.b.1", "a.3.b.1"], "a.{0-1,3}.b.1"),
        (["layers.2.mlp", "layers.2.mlp"], "layers.2.mlp"),
        (["v2.layer", "v3.layer"], "v2.layer, v3.layer"),
    ],
)
def test_collapse(names: list[str], text: str) -> None:
    assert collapse(names) == text
