"""`zeta parity`: every library and device of a machine against float64, with deliberate mistakes that it must catch."""
