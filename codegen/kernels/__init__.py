"""The kernels by hand: real `@triton.jit` functions, one idea a file, that `emit` specialises for a layer.

Letters: T tokens, D model width, F expert hidden width, E experts, K experts per token, P = T·K pairs; pair
t·K + k is slot k of token t. Names in capitals are constants of the layer or of its plan: what they decide is
folded away in the source that runs.
"""
