"""Small models as quantizing frameworks export them: what the passes on Q/DQ must read."""
