"""Many adapters of one base.

- ``_stack.py``: several adapters as one tree, and apart again (``stack``, ``unstack``).
- ``_stack_adapters.py``: adapters of one kernel as one node.
- ``_stack_fully_trained.py``: leaves that are fully trained, side by side.
- ``_cache_norm.py``: DoRA's norm computed once (``cache_norm``).
- ``_optimizer.py``: an optimizer for each stacked adapter (``per_adapter``).
- ``_pool.py``: adapters by name, the last used ones in memory (``AdapterPool``).
- ``_structure.py``: the structure and the shapes that all adapters of a pool have.
- ``_lru_slots.py``: which names are in the pool's slots: the last used ones.
- ``_folders.py``: loads adapters by the name of their folder.
"""
