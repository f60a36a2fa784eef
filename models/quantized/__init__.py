"""Small models as quantizing frameworks export them: what passes on Q/DQ must read."""
