"""A fused program in the formats of other compilers: optimised ONNX, torch-mlir."""
