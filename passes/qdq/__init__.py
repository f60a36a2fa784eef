"""Rewrites around QuantizeLinear and DequantizeLinear."""
