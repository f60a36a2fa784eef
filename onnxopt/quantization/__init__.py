"""Quantization arithmetic: what the ONNX operators compute, to the bit."""
