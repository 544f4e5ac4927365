"""Checkpoints in safetensors files: what is in them, checked before anything is read, and read once."""
