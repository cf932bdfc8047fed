"""The transcoder in the place of a language model's MLPs."""
