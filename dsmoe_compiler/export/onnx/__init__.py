"""A fused program as an ONNX model: each layer carried through torch's exporter, then lowered."""
