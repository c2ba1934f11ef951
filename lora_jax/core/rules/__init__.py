"""What the user says, and which parameters it is for.

- ``_rule.py``: one rule, which kernels are adapted and how (``Rule``).
- ``_config.py``: the rules, and the leaves that are fully trained (``LoraConfig``).
- ``_match_paths.py``: which rule each path has.
- ``_hints.py``: what the likeliest mistakes are told.
"""
