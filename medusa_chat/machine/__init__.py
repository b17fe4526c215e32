"""This machine: its devices, and the memory that a model needs. No torch until a device is asked.

devices.py    devices and number formats, their names, what is free, peaks, the heap
contents.py   the weights of a model, counted in the headers of its files
plans.py      the memory that a load needs, part by part
openmp.py     how threads of torch's operations wait for work
memory.py     the memory that a load needs, and what would make it fit
"""
