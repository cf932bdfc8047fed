"""A campaign of faults: what an operator's bad week does to every command, and whether anything is lost."""
