"""Energy: which counters a machine has, and how the joules of a piece of work are read from them."""
