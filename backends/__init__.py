"""What the machine is: its devices, their memory, and how time and memory are measured on them."""
