"""A causal language model: loading, adapters, fast kernels, shared prefixes. No Lightning."""
