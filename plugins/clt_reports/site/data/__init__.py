"""The files of a site's `data/`."""
