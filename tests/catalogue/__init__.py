"""Tests that need the fetched real models."""
