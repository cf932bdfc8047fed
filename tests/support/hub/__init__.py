"""A stand-in of the hub's HTTP interface on this machine, and a guard that lets no connection leave it."""
