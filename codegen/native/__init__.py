"""The CPU kernels' C++ text, which is built on the machine that runs it; `sources` reads it."""
