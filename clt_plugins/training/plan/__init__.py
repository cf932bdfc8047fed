"""What a run will need before it starts: memory, disk, time on a device; and what would make it faster.

build      from a recipe to a plan
records    what a plan holds
work       what a training step has to do: products, pairs, rows, bytes
memory     bytes at the peak of a step, by part; disk
machines   ceilings of GPUs, as published, and what share of them is reached
measure    the same of this machine, measured in seconds
times      seconds of each part of a step, and what bounds it
advice     changes of settings that would be faster
table      a plan for people
"""
