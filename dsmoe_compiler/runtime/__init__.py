"""What runs a fused layer: the reference anywhere, sorted segments on a CPU."""
