"""A compiler for Mixture-of-Experts models."""
