"""What a transcoder's features do in a text, in one folder: the store that reports are made from.

`schema` says what is in it, `reader` reads it, `writer` writes it.
"""
