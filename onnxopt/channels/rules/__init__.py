"""How each operator treats channels: one small rule each, in `table`."""
