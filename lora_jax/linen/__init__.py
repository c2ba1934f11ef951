"""The front end for Flax Linen: the interceptor, the layers, and the discovery of axes."""
