"""Files, without a model.

The folder that an adapter is saved in:

- ``_save.py``: adapters into a folder (``save``).
- ``_load.py``: adapters out of a folder into trees (``load``).
- ``_read_folder.py``: what a folder holds, as NumPy's arrays by path.
- ``_adapter_json.py``: ``adapter.json``: what it must have, and its checksum.
- ``_node_kinds.py``: how each kind of node is written.
- ``_collections.py``: other collections of the model, such as ``batch_stats``.
- ``_fingerprint.py``: hashes of the base, and the check that a base has them.
- ``_array_names.py``: leaves by the paths that files have.

Files in general:

- ``_checkpoint.py``: the safetensors files of a model, one or many.
- ``_tensors.py``: one safetensors file.
- ``_json.py``: JSON, read strictly.
- ``_bytes.py``: files opened and replaced safely.
- ``_to_host.py``: arrays out of JAX, to be written.
"""
