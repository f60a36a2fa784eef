"""Feeds: what models are run on, from the user's data or made up."""

from __future__ import annotations

from onnxopt.data.generate import (
    Binding,
    GeneratedFeeds,
    candidate_bindings,
    generate_feeds,
)
from onnxopt.data.inputs import Feed, Feeds, InputSpec, input_specs, parse_shape
from onnxopt.data.load import load_feeds, load_function

__all__ = [
    "Binding",
    "Feed",
    "Feeds",
    "GeneratedFeeds",
    "InputSpec",
    "candidate_bindings",
    "generate_feeds",
    "input_specs",
    "load_feeds",
    "load_function",
    "parse_shape",
]
