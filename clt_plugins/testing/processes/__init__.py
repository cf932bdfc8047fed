"""Checks that need other processes: ranks, and a logger in a process that dies."""
