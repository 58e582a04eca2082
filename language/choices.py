"""Settings of a language model that take one of a few words; imports nothing heavy."""

DEVICES = ("auto", "cpu", "cuda")
MODEL_DTYPES = ("auto", "float32", "bfloat16", "float16")
BOS_RULES = ("auto", "always", "never")
