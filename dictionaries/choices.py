"""Settings of a dictionary that take one of a few words; imports nothing heavy."""

ACTIVATIONS = ("topk", "batchtopk", "jumprelu")
