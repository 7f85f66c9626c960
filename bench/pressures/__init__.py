"""Recovery pressures: what brings forgotten knowledge back, by changing the weights a little or asking differently."""
