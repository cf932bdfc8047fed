"""What checkpoints hold besides the transcoder: what plugins keep, and what the optimizer keeps."""
