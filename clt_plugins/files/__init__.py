"""Folders that are written atomically, JSON files of records, and tensors cut into one file per rank."""
