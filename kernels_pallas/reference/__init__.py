"""The twins: what every kernel computes, in plain jnp. They run on a CPU, and kernels are tested against them."""
