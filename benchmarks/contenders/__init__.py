"""Ways to train or to serve: this library's, what one writes by hand, and other libraries'.

`table` builds one by its name. `step` says what it then is, and `families` which of them compute
the same. Those of JAX that train are in `problems`, those of PyTorch in `pytorch`.
"""
