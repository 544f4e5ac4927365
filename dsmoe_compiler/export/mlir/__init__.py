"""A fused program as MLIR: in torch-mlir's dialect with its layers whole, or lowered to linalg on tensors."""
