"""DeepSeek-V3 in JAX: the model, its training and its serving, as the V3 technical report describes them."""
