"""Values of a store's settings that are one of a few words; imports nothing heavy."""

DEFAULT_STORE = "acts"
"""Folder of a store, unless another is named."""
ACTIVATION_DTYPES = ("bfloat16", "float16", "float32", "int8")
COMPRESSION_LEVELS = {"lz4": 5, "zstd": 1}
COMPRESSIONS = ("none", *COMPRESSION_LEVELS)
OUTPUTS = ("store", "derive")
