"""The CPU kernels as a shared library: built on first use, kept, loaded, called."""
