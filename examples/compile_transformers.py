"""Compile a transformers Mixture-of-Experts model (random weights, two small layers) and compare with eager.

python examples/compile_transformers.py
"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import dsmoe_compiler as dsmoe


def main() -> None:
    """Build, compile, print the report, compare on a shape the example did not have."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    program = dsmoe.compile(model, (), {"input_ids": torch.randint(512, (1, 8)), "use_cache": False})
    print(program.report)
    input_ids = torch.randint(512, (3, 21))
    with torch.no_grad():
        expected = model(input_ids=input_ids, use_cache=False).logits
        actual = program(input_ids=input_ids, use_cache=False).logits
    print(f"\nbatch 3, length 21: largest difference {(actual - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
