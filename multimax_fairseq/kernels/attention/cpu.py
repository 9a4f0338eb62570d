"""Stands for the C++ of branch cpp."""


def serves(query, key, value, rows, mask):
    return False
