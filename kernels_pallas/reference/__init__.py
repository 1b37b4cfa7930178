"""The twins: every kernel's operation in plain jnp. They run on a CPU, and kernels are tested against them."""
