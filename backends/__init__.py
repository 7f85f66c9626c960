"""What the machine is: its processor, memory, and how time and memory are measured on it."""
