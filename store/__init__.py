"""What is remembered: the stores behind `saga.ports.Store`."""
