"""Quantization algorithms: arrays in, arrays out; no files, configs or models."""
