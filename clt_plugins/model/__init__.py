"""The transcoder: encoder, selection, sparse products, normaliser, files; and how a recipe's parts are assembled."""
