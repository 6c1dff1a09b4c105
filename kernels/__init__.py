"""Numerical kernels: small pure functions on arrays. Apart from checks, they depend only on JAX.

`reference` defines the mathematics in plain JAX. The models call `api`, which chooses an implementation;
`trial` compares it with the reference at its first use on a device.
"""
