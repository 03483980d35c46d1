"""The engine's logic: phases, verification, sampling, scheduling, blocks, messages.

Pure Python and torch. Knows no Ray, no Triton, no HTTP, no processes and no clocks: time and noise come in as
arguments. A test imports every module here in a fresh interpreter and looks for the forbidden ones.
"""
