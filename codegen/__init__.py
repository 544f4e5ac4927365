"""MoESpec + target -> kernels: which kernels a layer needs, with which tiles, and their source.

The room sees specs (`dsmoe_compiler.ir.spec`) and targets only. It never sees `torch.fx`: what a layer *is*
was settled by the passes, and how a kernel is launched is the runtime's affair.
"""
