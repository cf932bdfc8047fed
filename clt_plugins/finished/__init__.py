"""A finished transcoder: found on disk, converted, evaluated, exported."""
