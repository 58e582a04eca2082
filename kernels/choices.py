"""Settings of the kernels that take one of a few words; imports nothing heavy."""

BACKENDS = ("auto", "torch", "triton", "reference")
SELECTIONS = ("relu", "abs")
