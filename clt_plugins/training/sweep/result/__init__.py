"""What a sweep ends in: the frontier as a table, a page and a picture."""
