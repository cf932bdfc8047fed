"""Folders that are written atomically, and tensors cut into one file per rank."""
