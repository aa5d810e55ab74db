"""Device helpers shared by the kernels, one concept a file."""
