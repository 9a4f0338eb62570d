"""The formulas of :mod:`multimax_fairseq.mappings` and :mod:`multimax_fairseq.attention`, fast.

A folder for each operation: :mod:`.rows`, :mod:`.attention`, and :mod:`.loss`. :mod:`.backend` says whether
anything but the formula may compute. Who only wants to know what is computed never opens this folder.
"""
