"""Symbolic inference: types, dims and the values of shapes, with sizes as polynomials."""
