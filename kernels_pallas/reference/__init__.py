"""The twins: what every kernel computes, in plain jnp. They are what runs on a CPU, and what kernels are tested against."""
