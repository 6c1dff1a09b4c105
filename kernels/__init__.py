"""Numerical kernels: small pure functions on arrays that depend on JAX and nothing else here.

`reference` states the mathematics in plain JAX; `api` is what the models call and picks an implementation.
"""
