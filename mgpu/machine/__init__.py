"""What the machine is: a snapshot as a value, the readers that make one, and simulated machines."""
